"""Words one by one: what may follow, how it is drawn, and rows that do not wait for each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from popen.model.batches import Row
from popen.model.generate import generate
from popen.model.segmenter import Segmenter
from popen.model.speech import Member, choose, speak
from popen.samples import Sample

CODEBOOK, IMAGE_ID = [5, 6, 7], 8
NEVER = torch.tensor([6, 7, IMAGE_ID])


def chosen(logits: torch.Tensor, last: list[int], temperature: float = 0.0, chance: float = 0.0) -> list[int]:
    rows = torch.ones(len(last))
    return choose(logits, torch.tensor(last), CODEBOOK, NEVER, temperature * rows, chance * rows).tolist()


def test_codebook_tokens_come_as_whole_targets() -> None:
    logits = torch.zeros(5, 10)
    logits[:, [6, 7, IMAGE_ID]] = 9.0  # the model would say half a target, or an image
    logits[:, 3], logits[:, CODEBOOK[0]] = 1.0, 2.0
    assert chosen(logits, [-1, 5, 6, 7, 1]) == [5, 6, 7, 5, 5]
    assert logits[0, 6] == 9.0  # the caller's own are left alone
    for chance in (0.0, 0.5, 0.999999):
        drawn = chosen(logits, [-1, 5, 6, 7, 1], 50.0, chance)
        assert drawn[1:3] == [6, 7]
        assert not {6, 7, IMAGE_ID} & {drawn[0], *drawn[3:]}


def test_a_draw_is_where_the_distribution_function_passes_the_chance() -> None:
    logits = torch.full((1, 10), -torch.inf)
    logits[0, [1, 3, 9]] = torch.tensor([0.5, 0.3, 0.2]).log()
    for chance, token in ((0.0, 1), (0.499, 1), (0.501, 3), (0.799, 3), (0.801, 9), (0.9999999, 9)):
        assert chosen(logits, [-1], 1.0, chance) == [token]
    squares = torch.tensor([0.25, 0.09, 0.04])  # at temperature 1/2 a distribution is squared
    first = float(squares[0] / squares.sum())
    assert chosen(logits, [-1], 0.5, first - 0.01) == [1]
    assert chosen(logits, [-1], 0.5, first + 0.01) == [3]


def test_members_choose_each_in_its_way() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 2] = 1.0
    mixed = choose(logits, torch.tensor([-1, -1]), CODEBOOK, NEVER, torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert mixed.tolist() == [2, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_row_says_does_not_depend_on_the_others(
    taught: Segmenter, data: tuple[Path, list[Sample]], temperature: float
) -> None:
    """Answers end at different words, and rows that have ended leave the batch."""
    root, samples = data
    images = [Image.open(root / sample.image) for sample in samples]
    rows = [Row(index, sample.question) for _ in range(3) for index, sample in enumerate(samples)]
    together = generate(taught, images, rows, 24, temperature, seed=4)
    assert len({len(answer.token_ids) for answer in together}) > 1
    batch = taught.encoder.batch(images, rows)
    features = taught.tower(batch.images)
    speech = speak(taught, batch, features, 24, [Member(temperature, 4)])
    end = taught.tokenizer.eos_token_id
    for said, answer in zip(speech.tokens.tolist(), together, strict=True):
        assert said[: len(answer.token_ids)] == answer.token_ids
        if end in said:  # else it was cut off
            assert set(said[said.index(end) + 1 :]) <= {taught.tokenizer.pad_token_id}
    if temperature == 0.0:
        for row, answer in zip(rows, together, strict=True):
            (alone,) = generate(taught, [images[row.image]], [Row(0, row.question)], 24)
            assert (alone.text, alone.token_ids) == (answer.text, answer.token_ids)
            torch.testing.assert_close(alone.masks, answer.masks, atol=1e-3, rtol=1e-3)
    else:
        short = [rows[0], *(Row(0, "What?") for _ in rows[1:])]
        other = generate(taught, images[:1], short, 24, temperature, seed=4)
        assert other[0].token_ids == together[0].token_ids


def test_hidden_states_are_those_of_a_pass_over_the_whole_answer(
    taught: Segmenter, data: tuple[Path, list[Sample]]
) -> None:
    root, samples = data
    images = [Image.open(root / sample.image) for sample in samples]
    rows = [Row(index, sample.question) for index, sample in enumerate(samples)]
    batch = taught.encoder.batch(images, rows)
    features = taught.tower(batch.images)
    speech = speak(taught, batch, features, 24, [Member()])
    texts = [answer.text for answer in generate(taught, images, rows, 24)]
    answered = [Row(row.image, row.question, text) for row, text in zip(rows, texts, strict=True)]
    whole = taught.encoder.batch(images, answered)
    with torch.no_grad():
        hidden = taught.hidden(whole, taught.image_tokens(features, batch.images))
    for row in range(len(rows)):
        length = len(taught.encoder.answer_ids(texts[row]))
        read = hidden[row, -length:-1]  # the end token is read by nobody
        torch.testing.assert_close(speech.hidden[row, : length - 1], read, atol=1e-4, rtol=1e-4)
