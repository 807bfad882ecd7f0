"""Free-running answers: whole targets, honest likelihoods, sampling from the whole distribution."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from popen.model import generate as made_by
from popen.model.batches import Batch, Row
from popen.model.generate import _text, generate, generate_members
from popen.model.losses import token_logps
from popen.model.segmenter import Segmenter
from popen.model.speech import Member, Speech
from popen.samples import Sample


def prefer(model: Segmenter, picture: Image.Image, token: int) -> Segmenter:
    """A copy that begins its answer to "What?" with this token."""
    model = copy.deepcopy(model)
    batch = model.encoder.batch([picture], [Row(0, "What?")])
    with torch.no_grad():
        last = model.hidden(batch, model.image_tokens(model.tower(batch.images), batch.images))[0, -1]
        model.causal.lm_head.weight[token] = 40 * last / last.norm() ** 2
    return model


@pytest.mark.parametrize(("length", "targets"), [(1, 0), (3, 0), (4, 0), (5, 1)])
def test_a_target_that_is_cut_off_is_left_out(
    mini_model: Segmenter, picture: Image.Image, length: int, targets: int
) -> None:
    """Four tokens a target, and the last one's hidden state needs a fifth step."""
    model = prefer(mini_model, picture, mini_model.encoder.first_id)
    (answer,) = generate(model, [picture], [Row(0, "What?")], length)
    assert len(answer.masks) == len(answer.embeddings) == answer.text.count("{seg}") == targets
    assert answer.token_ids.count(model.encoder.first_id) == targets
    assert answer.masks.shape[1:] == (32, 32)
    assert not answer.ended


def test_an_answer_may_be_empty(mini_model: Segmenter, picture: Image.Image) -> None:
    model = prefer(mini_model, picture, mini_model.tokenizer.eos_token_id)
    (answer,) = generate(model, [picture], [Row(0, "What?")], 8)
    assert (answer.text, answer.token_ids, answer.ended) == ("", [], True)
    assert answer.logp == pytest.approx(0.0, abs=0.05)  # the end token's own, which is all but certain


def test_logp_is_that_of_the_words_alone(taught: Segmenter, data: tuple[Path, list[Sample]]) -> None:
    """The tokens that follow the first one of a target are forced, whatever the model thinks of them."""
    root, samples = data
    image, question = Image.open(root / samples[0].image), samples[0].question
    (answer,) = generate(taught, [image], [Row(0, question)], 24)
    batch = taught.encoder.batch([image], [Row(0, question, answer.text)])
    with torch.no_grad():
        logps = token_logps(taught(batch).logits, batch)[0]
    names = taught.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    chosen = [name not in taught.encoder.codebook[1:] for name in names]
    words = logps[batch.labels[0].ge(0) & torch.tensor(chosen)]
    assert len(words) == len(answer.token_ids) + 1 - 2 * 3  # the end token, not the three forced ones
    assert answer.logp == pytest.approx(float(words.mean()), abs=1e-4)


def test_sampling_takes_the_whole_distribution(mini_model: Segmenter, picture: Image.Image) -> None:
    rows = [Row(0, "What?")] * 200
    drawn = generate(mini_model, [picture], rows, 1, temperature=1.0)
    kinds = {answer.token_ids[0] for answer in drawn if answer.token_ids}
    assert len(kinds) > 80  # an untrained model is all but indifferent between its 300 tokens
    cold = generate(mini_model, [picture], rows, 1, temperature=1e-3)
    assert len({tuple(answer.token_ids) for answer in cold}) == 1


def test_sampling_leaves_the_callers_random_numbers_alone(
    mini_model: Segmenter, picture: Image.Image
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    generate(mini_model, [picture], [Row(0, "What?")], 3, 1.0, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_answers_are_those_that_were_taught(taught: Segmenter, data: tuple[Path, list[Sample]]) -> None:
    root, samples = data
    images = [Image.open(root / sample.image) for sample in samples]
    asked = [Row(index, sample.question) for index, sample in enumerate(samples)]
    found = generate(taught, images, asked, 24)
    assert [answer.text for answer in found] == [sample.answer for sample in samples]
    assert all(answer.token_ids == taught.encoder.answer_ids(answer.text)[:-1] for answer in found)


@pytest.mark.parametrize(("most", "passes"), [(12, 1), (11, 2), (8, 2), (3, 3)])
def test_members_share_passes_of_a_limited_size(
    taught: Segmenter,
    data: tuple[Path, list[Sample]],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    passes: int,
) -> None:
    """What a large model keeps of its rows would not fit a device otherwise."""
    root, samples = data
    images = [Image.open(root / sample.image) for sample in samples]
    asked = [Row(index, sample.question) for index, sample in enumerate(samples)]
    members = [Member(0.0, 5), Member(1.2, 6), Member(1.2, 7)]
    alone = [generate(taught, images, asked, 24, one.temperature, one.seed) for one in members]
    rows, speak = list[int](), made_by.speak

    def counted(model: Segmenter, batch: Batch, *more: Any) -> Speech:
        rows.append(len(batch.asked))
        return speak(model, batch, *more)

    monkeypatch.setattr(made_by, "speak", counted)
    monkeypatch.setattr(made_by, "ROWS_AT_ONCE", {"cpu": most})
    found = generate_members(taught, images, asked, 24, members)
    assert (len(rows), sum(rows), max(rows) <= max(most, len(asked))) == (passes, 12, True)
    assert [[a.text for a in said] for said in found] == [[a.text for a in said] for said in alone]


def test_an_answer_tells_whether_it_ended_by_itself(
    taught: Segmenter, data: tuple[Path, list[Sample]]
) -> None:
    """At every limit, beside a row that needs less: the end token itself has to fit."""
    root, samples = data
    images = [Image.open(root / sample.image) for sample in samples[:2]]
    asked = [Row(index, sample.question) for index, sample in enumerate(samples[:2])]
    lengths = [len(taught.encoder.answer_ids(sample.answer)) for sample in samples[:2]]
    assert lengths[1] < lengths[0]
    for limit in range(1, lengths[0] + 2):
        found = generate(taught, images, asked, limit)
        assert [answer.ended for answer in found] == [length <= limit for length in lengths]
        for answer, sample in zip(found, samples, strict=False):
            assert sample.answer.startswith(answer.text)


def test_the_mark_in_ordinary_tokens_is_a_word(mini_model: Segmenter) -> None:
    """Whoever asks to say it back gets no target without a mask for it."""
    tokenizer = mini_model.tokenizer
    codebook = tokenizer.convert_tokens_to_ids(mini_model.encoder.codebook)
    written = tokenizer.encode(" say {seg} and {s{seg}eg}", add_special_tokens=False)
    text = _text(tokenizer, [*written, *codebook, *written], codebook)
    assert text == "say seg and {ssegeg}{seg} say seg and {ssegeg}"
