"""The ensemble at work on a miniature model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from popen.ensemble.attention import RefinementAttention
from popen.ensemble.members import (
    Aligned,
    Ensemble,
    Members,
    align,
    ask,
    copies,
    implicit_rewards,
    load,
    refine,
    save,
)
from popen.ensemble.score import FEATURES, REWARD, Score, reward_score
from popen.evaluation.answering import mask_confidence
from popen.evaluation.iou import iou_matrix, matched_value
from popen.model import IGNORED
from popen.model.batches import Row
from popen.model.generate import generate
from popen.model.losses import token_logps
from popen.model.segmenter import Segmenter
from popen.params import EnsembleParams
from popen.samples import Sample

PARAMS = EnsembleParams(
    members=3, mode="attention", score="calibrated", temperature=1.0, sigma=0.6, side=(0.3, 0.6), steps=1
)
MODES = ("attention", "mean", "best", "probability")
LENGTH = 24


def by(name: str, sign: float = 1.0) -> Score:
    """A score that is one feature."""
    return Score(FEATURES, (0.0,) * 3, (1.0,) * 3, tuple(sign * (feature == name) for feature in FEATURES))


@pytest.fixture(scope="module")
def asked(data: tuple[Path, list[Sample]]) -> tuple[list[Image.Image], list[str]]:
    root, samples = data
    return [Image.open(root / sample.image) for sample in samples[:3]], [s.question for s in samples[:3]]


Asked = tuple[list[Image.Image], list[str]]


def say(model: Segmenter, asked: Asked, members: int = 3, seed: int = 0, reference: object = None) -> Members:
    other = reference if isinstance(reference, Segmenter) else None
    return ask(model, other, *asked, PARAMS, members, LENGTH, 0.0, seed)


def seen(model: Segmenter, asked: Asked, members: int, seed: int = 0) -> Tensor:
    return copies(model.encoder.pixels(asked[0]), PARAMS, members, seed)


def ensemble(model: Segmenter, score: Score | None = None, **changes: object) -> Ensemble:
    attention = RefinementAttention(model.codebook.scales, model.params.decoder.width)
    params = PARAMS.model_copy(update=changes)
    score = score or by("logp")
    return Ensemble(model, model if score.features == REWARD else None, score, attention, params, 0.0)


def opened(model: Segmenter) -> RefinementAttention:
    """An attention that was trained: gate open, affinities anything."""
    torch.manual_seed(0)
    attention = RefinementAttention(model.codebook.scales, model.params.decoder.width)
    with torch.no_grad():
        attention.gate.fill_(0.7)
        attention.affinity.normal_(std=0.3)
    return attention


@pytest.mark.parametrize("mode", MODES)
def test_an_ensemble_of_one_is_the_plain_greedy_answer(taught: Segmenter, asked: Asked, mode: str) -> None:
    images, questions = asked
    plain = generate(taught, images, [Row(i, question) for i, question in enumerate(questions)], LENGTH)
    system = ensemble(taught)
    found = system.refined(*system.gather(images, questions, 1, LENGTH, seed=3), mode)
    for one, other in zip(found, plain, strict=True):
        assert (one.text, one.token_ids, one.logp) == (other.text, other.token_ids, other.logp)
        torch.testing.assert_close(one.embeddings, other.embeddings, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.masks.sigmoid(), other.masks.sigmoid(), atol=1e-4, rtol=1e-3)


def test_untrained_attention_leaves_the_clean_masks(taught: Segmenter, asked: Asked) -> None:
    images, questions = asked
    certain = by("logp")  # the greedy answer of so sure a model is the likeliest
    found = ensemble(taught, certain).answer(images, questions, 3, LENGTH, seed=0)
    plain = generate(taught, images, [Row(i, question) for i, question in enumerate(questions)], LENGTH)
    same = [(one, other) for one, other in zip(found, plain, strict=True) if one.text == other.text]
    assert same
    for one, other in same:
        torch.testing.assert_close(one.masks, other.masks, atol=1e-3, rtol=1e-3)


def test_members_in_one_pass_are_those_asked_one_by_one(taught: Segmenter, asked: Asked) -> None:
    images, questions = asked
    rows = [Row(i, question) for i, question in enumerate(questions)]
    one = [
        generate(taught, images, rows, LENGTH, PARAMS.temperature * (member > 0), 5 + member)
        for member in range(3)
    ]
    reads: list[int] = []
    hook = taught.tower.register_forward_hook(lambda _module, images, _levels: reads.append(len(images[0])))
    all_at_once = say(taught, asked, seed=5)
    hook.remove()
    assert reads == [3]  # each image once, for all members
    assert len({tuple(a.text for a in answers) for answers in one}) > 1  # the draws are not all alike
    for apart, joint in zip(one, all_at_once.answers, strict=True):
        assert [a.text for a in apart] == [a.text for a in joint]
        assert [a.token_ids for a in apart] == [a.token_ids for a in joint]
        for a, b in zip(apart, joint, strict=True):
            torch.testing.assert_close(a.masks, b.masks, atol=1e-3, rtol=1e-3)


def test_members_see_in_one_pass_what_they_see_one_by_one(taught: Segmenter, asked: Asked) -> None:
    images, questions = asked
    texts = ["the cup {seg} and the fork {seg}", "nothing", "the fork {seg}"]
    scores = np.arange(9.0).reshape(3, 3)
    pixels = seen(taught, asked, 3)
    for words in (texts, ["nothing"] * 3):
        alone, two, every = (align(taught, images, questions, words, pixels, scores, n) for n in (1, 2, 3))
        for other in (two, every):
            torch.testing.assert_close(alone.embeddings, other.embeddings, atol=1e-4, rtol=1e-4)
            assert torch.equal(alone.scores, other.scores)
            for levels, others in zip(alone.features, other.features, strict=True):
                torch.testing.assert_close(levels, others, atol=1e-5, rtol=1e-5)


def test_member_zero_is_greedy_and_the_others_are_drawn(taught: Segmenter, asked: Asked) -> None:
    images, questions = asked
    said = say(taught, asked, members=4)
    greedy = generate(taught, images, [Row(i, question) for i, question in enumerate(questions)], LENGTH)
    assert [a.text for a in said.answers[0]] == [a.text for a in greedy]
    assert len({tuple(a.text for a in answers) for answers in said.answers}) > 1
    again = say(taught, asked, members=4)
    assert [[a.text for a in m] for m in again.answers] == [[a.text for a in m] for m in said.answers]
    fewer = say(taught, asked, members=2)  # more members leave the first ones as they are
    np.testing.assert_allclose(fewer.features[..., :2], said.features[:, :2, :2], atol=1e-5)  # not agreement


def test_member_zero_sees_the_image_and_the_others_noisy_copies(taught: Segmenter, asked: Asked) -> None:
    clean, pixels = taught.encoder.pixels(asked[0]), seen(taught, asked, 4)
    assert pixels.shape == (4, 3, 3, 32, 32)
    assert torch.equal(pixels[0], clean)
    changed = (pixels[1:] != clean).any(2).float().mean((2, 3))  # share of the pixels, (members, rows)
    assert (changed > 0.05).all()
    assert (changed < 0.4).all()  # a rectangle of at most 0.6 x 0.6
    assert torch.equal(seen(taught, asked, 4), pixels)
    assert not torch.equal(seen(taught, asked, 4, seed=1)[1:], pixels[1:])
    assert torch.equal(seen(taught, asked, 2), pixels[:2])


def test_only_the_embeddings_come_from_the_copies(taught: Segmenter, asked: Asked) -> None:
    loud, none = (ensemble(taught, sigma=sigma).gather(*asked, 4, LENGTH, seed=0) for sigma in (50.0, 0.0))
    assert [a.text for a in loud[0]] == [a.text for a in none[0]]
    torch.testing.assert_close(loud[1].scores, none[1].scores)
    torch.testing.assert_close(loud[1].embeddings[:, 0], none[1].embeddings[:, 0])
    assert not torch.allclose(loud[1].embeddings[:, 1:], none[1].embeddings[:, 1:])


def test_features_are_what_their_names_say(taught: Segmenter, asked: Asked) -> None:
    said = say(taught, asked)
    assert said.features.shape == (3, 3, len(FEATURES))
    for member, answers in enumerate(said.answers):
        for row, answer in enumerate(answers):
            logp, sure, agreed = said.features[row, member]
            assert logp == pytest.approx(answer.logp)
            expected = float(mask_confidence(answer.masks, 0.0).mean()) if len(answer.masks) else 0.0
            assert sure == pytest.approx(expected)
            drawn = [[mask.numpy() > 0 for mask in said.answers[m][row].masks] for m in range(3)]
            others = [drawn[m] for m in range(3) if m != member]
            values = [matched_value(iou_matrix(drawn[member], other)) for other in others]
            assert agreed == pytest.approx(np.mean(values), abs=1e-5)


def test_with_a_reference_the_feature_is_the_implicit_reward(taught: Segmenter, asked: Asked) -> None:
    other = copy.deepcopy(taught)
    with torch.no_grad():
        other.causal.lm_head.weight.mul_(0.8)
    said = say(taught, asked, reference=other)
    assert said.features.shape == (3, 3, len(REWARD))
    for member, answers in enumerate(said.answers):
        for row, answer in enumerate(answers):
            image, question = asked[0][row], asked[1][row]
            batch = taught.encoder.batch([image], [Row(0, question, answer.text)])
            tokens = int((batch.labels != IGNORED).sum())
            with torch.no_grad():
                mine, theirs = (float(token_logps(net(batch).logits, batch).sum()) for net in (taught, other))
            assert said.features[row, member, 0] == pytest.approx((mine - theirs) / tokens, abs=1e-3)
    assert np.abs(said.features).max() > 0.01
    assert implicit_rewards(taught, taught, *asked, said.answers[0]) == [0.0] * 3


def test_the_best_scored_answer_is_kept(taught: Segmenter, asked: Asked) -> None:
    said = say(taught, asked, members=4, seed=2)
    logps = said.features[..., 0]
    for sign, choice in ((1.0, logps.argmax(1)), (-1.0, logps.argmin(1))):
        found = ensemble(taught, by("logp", sign)).answer(*asked, 4, LENGTH, seed=2)
        expected = [said.answers[member][row].text for row, member in enumerate(choice)]
        assert [answer.text for answer in found] == expected
        assert [answer.logp for answer in found] == pytest.approx([logps[r, m] for r, m in enumerate(choice)])
        for answer in found:
            assert len(answer.masks) == len(answer.embeddings) == answer.text.count("{seg}")


def aligned(model: Segmenter, asked: Asked, order: list[int]) -> Aligned:
    """The true answers seen by members in this order."""
    pixels = seen(model, asked, len(order))
    texts = ["It is the cup {seg} and the fork {seg}.", "It is the cup {seg}.", "Nothing."]
    scores = np.random.default_rng(0).normal(size=(3, len(order)))
    return align(model, *asked, texts, pixels[order], scores[:, order])


def test_every_member_sees_the_same_targets(taught: Segmenter, asked: Asked) -> None:
    found = aligned(taught, asked, [0, 1, 2])
    assert found.embeddings.shape == (3, 3, 2, 16)  # N targets, M members, S scales, C
    assert found.batch.row_of_target.tolist() == [0, 0, 1]
    for view, embeddings in zip(seen(taught, asked, 3), found.embeddings.unbind(1), strict=True):
        with torch.no_grad():
            output = taught(found.batch.with_images(view))
        torch.testing.assert_close(embeddings, output.embeddings, atol=1e-4, rtol=1e-4)
    scores = np.random.default_rng(0).normal(size=(3, 3))
    np.testing.assert_allclose(found.scores.numpy(), scores[[0, 0, 1]], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_perturbed_members_means_nothing(taught: Segmenter, asked: Asked, mode: str) -> None:
    attention = opened(taught)
    with torch.no_grad():
        first, second = (
            refine(taught, attention, aligned(taught, asked, order), mode)
            for order in ([0, 1, 2, 3], [0, 3, 1, 2])
        )
    torch.testing.assert_close(first.sigmoid(), second.sigmoid(), atol=1e-4, rtol=1e-4)


def test_modes_are_what_they_are_called(taught: Segmenter, asked: Asked) -> None:
    seen = aligned(taught, asked, [0, 1, 2])
    at, images = seen.batch.image_of_target, seen.batch.images

    def decoded(embeddings: Tensor) -> Tensor:
        return taught.decode(embeddings, seen.features[0], images, at)

    with torch.no_grad():
        masks = {mode: refine(taught, opened(taught), seen, mode) for mode in MODES}
        torch.testing.assert_close(masks["mean"], decoded(seen.embeddings.mean(1)))
        best = seen.embeddings[torch.arange(3), seen.scores.argmax(1)]
        torch.testing.assert_close(masks["best"], decoded(best))
        members = torch.stack([taught(seen.batch.with_images(view)).masks.sigmoid() for view in seen.views])
        torch.testing.assert_close(masks["probability"].sigmoid(), members.mean(0), atol=1e-5, rtol=1e-3)
        refined = opened(taught)(seen.embeddings, seen.scores)
        torch.testing.assert_close(masks["attention"], decoded(refined))
        clean = decoded(seen.embeddings[:, 0])
    assert all(not torch.allclose(mask, clean, atol=1e-3) for mask in masks.values())


def test_answers_without_any_target_need_no_masks(mini_model: Segmenter, asked: Asked) -> None:
    """An untrained model names no target."""
    answers = ensemble(mini_model, reward_score()).answer(*asked, 2, 3, seed=0)
    assert [len(answer.masks) for answer in answers] == [0, 0, 0]


def test_score_and_attention_come_back_from_their_files(taught: Segmenter, tmp_path: Path) -> None:
    score = dataclasses.replace(by("logp"), mean=(0.1, 1 / 3, -2.0), scale=(2.0, 0.5, 1e-3))
    attention = opened(taught)
    save(tmp_path / "bundle", score, attention)
    again, refined = load(tmp_path / "bundle", taught)
    assert again == score
    state = attention.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in refined.state_dict().items())
    assert set(refined.state_dict()) == set(state)
