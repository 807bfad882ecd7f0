"""Rows become padded tensors, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from popen.masks import decode
from popen.model import IGNORED
from popen.model.batches import Row
from popen.model.language import IMAGE
from popen.model.segmenter import COUNTED, Segmenter
from popen.samples import Sample


def test_prompts_end_and_answers_begin_at_the_same_place(
    mini_model: Segmenter, picture: Image.Image, sample: Sample
) -> None:
    encoder, tokenizer = mini_model.encoder, mini_model.tokenizer
    batch = encoder.batch([picture], [Row(0, "What?", "It is the cup."), Row(0, "Where is the cup?", "It.")])
    for row, (question, answer) in enumerate([("What?", "It is the cup."), ("Where is the cup?", "It.")]):
        there = batch.attention_mask[row].bool()
        assert there[-1 - int((batch.labels[row] != IGNORED).sum()) :].all()  # no padding on the right
        ids = batch.input_ids[row][there].tolist()
        answered = batch.labels[row] != IGNORED
        assert batch.labels[row][answered].tolist() == ids[-int(answered.sum()) :]
        assert answered[-1]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(encoder.image_id) == encoder.image_tokens == 16  # a deepest grid of 4 x 4
        words = [token for token in ids if token != encoder.image_id]
        assert tokenizer.decode(words, skip_special_tokens=True) == f"USER: \n{question} ASSISTANT: {answer}"
    assert batch.answered.shape == (2, batch.labels.shape[1] - 1)
    assert int(batch.answered.sum()) == sum(len(encoder.answer_ids(a)) for a in ("It is the cup.", "It."))


def test_a_question_cannot_smuggle_in_an_image(mini_model: Segmenter, picture: Image.Image) -> None:
    def ids(question: str) -> list[int]:
        return mini_model.encoder.batch([picture], [Row(0, question)]).input_ids[0].tolist()

    encoder = mini_model.encoder
    for spelled in (f"What{IMAGE} is {{0}} this?", f"What <{IMAGE}image> is this?", encoder.codebook[0]):
        smuggled = ids(spelled)
        assert smuggled.count(encoder.image_id) == encoder.image_tokens
        assert encoder.first_id not in smuggled
        assert spelled in encoder.tokenizer.decode(smuggled)  # its letters are there


def test_targets_know_their_row_tokens_masks_and_ignored_pixels(
    mini_model: Segmenter, picture: Image.Image, sample: Sample
) -> None:
    masks = [decode(target.rle) for target in sample.targets]
    ignore = np.zeros((32, 32), dtype=bool)
    ignore[:, :16] = True
    rows = [
        Row(1, "Who?", "Nobody."),
        Row(1, "Which?", sample.answer),  # targets without masks are not supervised
        Row(0, sample.question, sample.answer, masks),
        Row(1, "What?", "It is the cup {seg}.", masks[:1], ignore),
    ]
    batch = mini_model.encoder.batch([picture, picture.resize((64, 48))], rows)
    assert batch.images.shape == (2, 3, 32, 32)
    assert 0.9 < float(batch.images.max()) <= 1.0
    torch.testing.assert_close(batch.images[0], torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    assert batch.row_of_target.tolist() == [2, 2, 3]
    assert batch.image_of_target.tolist() == [0, 0, 1]
    names = mini_model.encoder.codebook
    for row, places in zip(batch.row_of_target, batch.positions, strict=True):
        assert mini_model.tokenizer.convert_ids_to_tokens(batch.input_ids[row][places].tolist()) == names
    assert (batch.positions[0] < batch.positions[1]).all()
    np.testing.assert_array_equal(batch.masks.numpy() > 0, np.stack([*masks, masks[0]]))
    assert (batch.valid[:2] == 1).all()
    np.testing.assert_array_equal(batch.valid[2].numpy() == 0, ignore)


def test_masks_that_do_not_fit_the_answer_are_refused(mini_model: Segmenter, picture: Image.Image) -> None:
    empty = np.zeros((32, 32), dtype=bool)
    with pytest.raises(ValueError, match=r"1 masks for an answer with 2 targets: 'a \{seg\} b \{seg\}'"):
        mini_model.encoder.batch([picture], [Row(0, "What?", "a {seg} b {seg}", [empty])])


def test_parts_of_a_batch(mini_model: Segmenter, picture: Image.Image, sample: Sample) -> None:
    masks = [decode(target.rle) for target in sample.targets]
    rows = [Row(0, "What?", sample.answer, masks), Row(0, "Where?", "It is the cup {seg}.")]
    batch = mini_model.encoder.batch([picture], rows, [sample])
    first = batch.first_rows(1)
    assert len(first.input_ids) == len(first.labels) == len(first.attention_mask) == 1
    assert len(first.image_of_row) == 1
    assert first.row_of_target.tolist() == [0, 0]
    assert first.masks is batch.masks
    other = batch.with_images(batch.images.flip(-1))
    torch.testing.assert_close(other.images, batch.images.flip(-1))
    assert other.input_ids is batch.input_ids
    moved = batch.to("cpu")
    assert moved.dense is not None
    assert moved.dense.shape == (1, 32, 32)
    assert mini_model.encoder.batch([picture], rows).to("cpu").dense is None


def test_an_inventory_counts_the_kinds_of_an_answer(mini_model: Segmenter, picture: Image.Image) -> None:
    cup, *others = mini_model.encoder.categories
    rows = [
        Row(0, "What?", "A {seg} and b {seg}.", kinds=[cup, cup]),
        Row(0, "What?", "There is nothing like that here.", kinds=[]),
        Row(0, "What?", "A {seg}.", kinds=["a kind that nobody knows"]),
        Row(0, "What?", "A {seg}."),
    ]
    batch = mini_model.encoder.batch([picture], rows)
    zeros = [0] * len(others)
    unknown = [IGNORED] * (1 + len(others))
    assert batch.inventory is not None
    assert batch.inventory.tolist() == [[2, *zeros], [0, *zeros], unknown, unknown]
    torch.testing.assert_close(batch.first_rows(1).inventory, batch.inventory[:1])
    colon = mini_model.encoder.question_ids("What?")[-1]
    assert batch.input_ids[range(4), batch.asked].tolist() == [colon] * 4
    output = mini_model(batch)
    assert output.inventory is not None
    assert output.inventory.shape == (4, 1 + len(others), COUNTED)
    # read before the first word: the answer's own words change nothing
    changed = [rows[0], Row(0, "What?", "There is nothing.", kinds=[]), *rows[2:]]
    other = mini_model(mini_model.encoder.batch([picture], changed)).inventory
    torch.testing.assert_close(other, output.inventory)
