"""L_pre on a miniature model: nothing to gain at the reference, and steps in the right direction."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from popen import devices
from popen.masks import decode, encode
from popen.model import IGNORED
from popen.model.batches import Row
from popen.model.losses import sft_loss, token_logps
from popen.model.segmenter import Segmenter
from popen.params import AlignParams, SftWeights, TrainParams
from popen.preference.alignment import (
    PreferenceBatch,
    align_loss,
    collate,
    collate_chosen,
    preference_loss,
    winners,
)
from popen.preference.records import MaskPairs, TextPair
from popen.preference.sampling import mask_pairs, text_pairs
from popen.preference.text import changed_spans
from popen.samples import Rle, Sample
from tests.conftest import WEIGHTS, square
from tests.preference import test_sampling

Data = tuple[Path, list[Sample]]
LOG2 = math.log(2.0)
TRAIN = TrainParams(
    steps=1,
    images=1,
    accumulate=1,
    lr=1e-3,
    muon=0.0,
    warmup=0,
    weight_decay=0,
    clip=1.0,
    checkpoint_every=1,
    eval_every=1,
)
PARAMS = AlignParams(
    train=TRAIN,
    text=1.0,
    beta_t=0.5,
    gamma=3.0,
    fewer=True,
    mask=1.0,
    mask_form="embedding",
    beta_s=0.2,
    anchor=1.0,
)
REJECTED = ("It is the fork {seg}.", "It is the cup {seg} and the fork {seg}.")


@pytest.fixture(scope="module")
def texts(taught: Segmenter, data: Data) -> list[TextPair]:
    """The first two questions (two targets, one target) with wrong answers, the third with a right one."""
    root, samples = data
    out = []
    for sample, rejected in zip(samples, (*REJECTED, samples[2].answer), strict=False):
        rows = [Row(0, sample.question, answer) for answer in (sample.answer, rejected)]
        batch = taught.encoder.batch([Image.open(root / sample.image)], rows)
        with torch.no_grad():
            logps = token_logps(taught(batch).logits, batch)
        ids = [taught.encoder.answer_ids(answer) for answer in (sample.answer, rejected)]
        changed = changed_spans(*ids)
        out.append(
            TextPair(
                sample.uid,
                sample.image,
                sample.question,
                sample.answer,
                rejected,
                sample.targets,
                changed[0],
                changed[1],
                logps[0, -len(ids[0]) :].tolist(),
                logps[1, -len(ids[1]) :].tolist(),
            )
        )
    return out


@pytest.fixture(scope="module")
def masks(taught: Segmenter, data: Data, texts: list[TextPair]) -> MaskPairs:
    """A pair for the first question's second target, for the second question's, for a stranger's."""
    batch = collate_chosen(taught, data[0], 2000)(texts)
    with torch.no_grad():
        clean = taught(batch)
    torch.manual_seed(0)
    at = [1, 2, 0]
    winner = clean.embeddings[at] + 0.3 * torch.randn(3, *clean.embeddings.shape[1:])
    loser = clean.embeddings[at] + 0.3 * torch.randn(3, *clean.embeddings.shape[1:])
    truth = batch.masks[at] > 0
    return MaskPairs(
        [texts[0].uid, texts[1].uid, "muse/train/9/9"],
        [1, 0, 0],
        winner,
        loser,
        clean.embeddings[at],
        winner_masks=truth,
        loser_masks=truth.roll(4, -1),
        reference_masks=clean.masks[at].half(),
        ious=torch.zeros(3, 3),
    )


def test_corrected_answers_come_first_and_carry_the_masks(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    made = collate(taught, data[0], 2000, masks)(texts)
    batch, tokenizer = made.batch, taught.tokenizer
    said = []
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        answer = labels[labels != IGNORED].tolist()
        assert answer == row[labels != IGNORED].tolist()
        assert answer[-1] == tokenizer.eos_token_id
        said.append(answer)
    expected = [p.chosen for p in texts] + [p.rejected for p in texts]
    forced = tokenizer.convert_tokens_to_ids(taught.encoder.codebook[1:])  # they carry no loss
    spoken = [[i for i in taught.encoder.answer_ids(a) if i not in forced] for a in expected]
    assert said == spoken
    assert batch.image_of_row.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.row_of_target.tolist() == [0, 0, 1, 2, 2]
    assert made.differs.tolist() == [True, True, False]
    values = [(p.chosen_changed, p.chosen_ref) for p in texts]
    values += [(p.rejected_changed, p.rejected_ref) for p in texts]
    for row, (mark, logps) in enumerate(values):
        tail = slice(-len(mark), None)  # the answer's tokens, forced ones included
        assert made.changed[row][tail].tolist() == mark
        assert made.reference[row][tail].tolist() == pytest.approx(logps)
        assert not made.changed[row][: -len(mark)].any()
        assert not made.reference[row][batch.labels[row] == IGNORED].any()
    first = winners(made)
    assert len(first.input_ids) == 3
    assert first.row_of_target.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 1, 0]])
def test_mask_pairs_find_their_targets(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs, order: list[int]
) -> None:
    """The reference embedding of a pair is that of the target that the pair points to, in any batch."""
    made = collate(taught, data[0], 2000, masks)([texts[index] for index in order])
    with torch.no_grad():
        output = taught(made.batch)
    assert len(made.pairs) == len(made.target_of_pair) == sum(order.count(index) for index in (0, 1))
    assert "muse/train/9/9" not in made.pairs.uids
    here = output.embeddings[made.target_of_pair]
    torch.testing.assert_close(here, made.pairs.reference, atol=1e-4, rtol=1e-4)
    others = [e for t, e in enumerate(output.embeddings) if t not in made.target_of_pair.tolist()]
    assert not any(torch.allclose(e, r, atol=1e-3) for e in others for r in made.pairs.reference)


@pytest.mark.parametrize("form", ["embedding", "mask"])
def test_the_reference_itself_has_nothing_to_gain(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs, form: str
) -> None:
    made = collate(taught, data[0], 2000, masks)(texts)
    params = PARAMS.model_copy(update={"mask_form": form})
    with torch.no_grad():
        loss, parts = preference_loss(taught(made.batch), made, params)
    assert float(parts["L_t"]) == pytest.approx(LOG2, abs=1e-4)
    assert float(parts["L_s"]) == pytest.approx(LOG2, abs=1e-3)  # mask references are halves
    assert float(loss) == pytest.approx(2 * LOG2, abs=1e-3)
    for name in ("rewards_t/margins", "rewards_s/margins"):
        assert float(parts[name]) == pytest.approx(0.0, abs=2e-3)
    halved = params.model_copy(update={"text": 0.5, "mask": 0.25})
    with torch.no_grad():
        loss, _ = preference_loss(taught(made.batch), made, halved)
    assert float(loss) == pytest.approx(0.75 * LOG2, abs=1e-3)


@pytest.mark.skipif(not devices.halves(), reason="this CPU emulates bfloat16")
def test_a_reference_in_bfloat16_has_nothing_to_gain_in_bfloat16(taught: Segmenter, data: Data) -> None:
    """In another precision it has, from nothing."""
    said = [
        pair
        for pair in text_pairs(taught, *data, test_sampling.TEXT, 3, 24, 2000, 0, bf16=True)
        if isinstance(pair, TextPair)
    ]
    pairs = mask_pairs(taught, data[0], said, test_sampling.MASKS, 3, 2000, 0, keep_masks=False, bf16=True)[
        "coarse"
    ]
    assert {value.dtype for value in (pairs.winner, pairs.loser, pairs.reference)} == {torch.float32}
    made = collate(taught, data[0], 2000, pairs)(said)
    assert made.differs.any()
    margins = []
    for halves in (True, False):
        with devices.autocast(halves), torch.no_grad():
            _, parts = preference_loss(taught(made.batch), made, PARAMS)
        margins.append(abs(float(parts["rewards_t/margins"])) + abs(float(parts["rewards_s/margins"])))
    assert margins[0] < margins[1] / 10


def test_the_anchor_is_the_sft_loss_of_the_winners_alone(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    made = collate(taught, data[0], 2000, masks)(texts)
    only = PARAMS.model_copy(update={"text": 0.0, "mask": 0.0, "anchor": 2.0})
    alone = collate_chosen(taught, data[0], 2000)(texts)
    ours = dict.fromkeys(("dense", "describe", "point", "look", "aim", "match"), 1.0)
    weights = SftWeights(ce=1.0, bce=2.0, dice=0.5, refine=1.0, inventory=0.0, **ours)
    with torch.no_grad():
        anchored, parts = align_loss(only, weights)(taught, made)
        expected, wanted = sft_loss(taught(alone), alone, weights)
    assert float(anchored) == pytest.approx(2 * float(expected), rel=1e-4)
    assert set(wanted) == {"ce", "bce", "dice", "point"}  # neither learns by more than the other
    for name, value in wanted.items():
        assert float(parts[f"anchor_{name}"]) == pytest.approx(float(value), rel=1e-3)


def test_ignored_pixels_count_neither_in_the_anchor_nor_in_the_control_chosen(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    """Whatever the true masks say there."""
    anchor = PARAMS.model_copy(update={"text": 0.0, "mask": 0.0})
    ignored = decode(square(0, 0, 24).rle)

    def losses(ignore: Rle | None, painted: bool) -> list[float]:
        pairs = []
        for pair in texts:
            regions = [decode(target.rle) | (ignored & painted) for target in pair.targets]
            targets = [
                dataclasses.replace(target, rle=encode(mask))
                for target, mask in zip(pair.targets, regions, strict=True)
            ]
            pairs.append(dataclasses.replace(pair, targets=tuple(targets), ignore=ignore))
        made = collate(taught, data[0], 2000, masks)(pairs)
        batch = collate_chosen(taught, data[0], 2000)(pairs)
        with torch.no_grad():
            anchored, _ = align_loss(anchor, WEIGHTS)(taught, made)
            return [float(anchored), float(sft_loss(taught(batch), batch, WEIGHTS)[0])]

    rle = encode(ignored)
    assert losses(rle, painted=True) == losses(rle, painted=False)
    assert losses(None, painted=True) != losses(None, painted=False)
    assert losses(encode(ignored & False), painted=False) == losses(None, painted=False)


@pytest.mark.parametrize(
    ("weights", "form", "raised"),
    [
        ({"text": 1.0, "mask": 0.0}, "embedding", "rewards_t"),
        ({"text": 0.0, "mask": 1.0}, "embedding", "rewards_s"),
        ({"text": 0.0, "mask": 1.0}, "mask", "rewards_s"),
    ],
)
def test_a_step_raises_the_margin(
    taught: Segmenter,
    data: Data,
    texts: list[TextPair],
    masks: MaskPairs,
    weights: dict[str, float],
    form: str,
    raised: str,
) -> None:
    model = copy.deepcopy(taught)
    made = collate(model, data[0], 2000, masks)(texts)
    params = PARAMS.model_copy(update={"mask_form": form, "anchor": 0.0, **weights})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses, margins = [], []
    for _ in range(3):
        loss, parts = align_loss(params, WEIGHTS)(model, made)
        losses.append(loss.item())
        margins.append(float(parts[f"{raised}/margins"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert margins == sorted(margins)
    assert margins[2] - margins[0] > 1e-4
    assert losses == sorted(losses, reverse=True)


def test_right_answers_teach_no_words_and_questions_without_pairs_no_masks(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    """A batch of the third question alone: its two answers are equal and it has no mask pair."""
    model = copy.deepcopy(taught)
    made = collate(model, data[0], 2000, masks)(texts[2:])
    assert len(made.pairs) == 0
    off = PARAMS.model_copy(update={"anchor": 0.0})
    loss, parts = align_loss(off, WEIGHTS)(model, made)
    assert loss.item() == 0.0
    assert not any(name.startswith("rewards") for name in parts)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_pairs_that_only_take_away_are_left_to_the_anchor(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    """The first question's answer gains a thing, the second's loses one."""
    model = copy.deepcopy(taught)
    with torch.no_grad():  # no longer the reference
        for weights in model.tower.parameters():
            weights.mul_(1.05)
    both, gains, loses = (collate(model, data[0], 2000, masks)(few) for few in (texts, texts[:1], texts[1:2]))
    assert both.differs.tolist() == [True, True, False]
    assert both.fewer.tolist() == [False, True, False]

    def text_alone(made: PreferenceBatch, fewer: bool) -> tuple[float, dict]:
        params = PARAMS.model_copy(update={"mask": 0.0, "fewer": fewer})
        with torch.no_grad():
            loss, parts = preference_loss(model(made.batch), made, params)
        return float(loss), parts

    gained, lost = text_alone(gains, True)[0], text_alone(loses, True)[0]
    assert abs(gained - lost) > 1e-3
    assert text_alone(both, True)[0] == pytest.approx((gained + lost) / 2, rel=1e-4)
    assert text_alone(both, False)[0] == pytest.approx(gained, rel=1e-4)
    nothing, parts = text_alone(loses, False)
    assert nothing == 0.0
    assert "rewards_t/margins" not in parts


def test_an_answer_without_targets_is_a_row_like_any_other(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    nothing = dataclasses.replace(texts[1], uid="none", targets=(), chosen="Nothing does.")
    ids = taught.encoder.answer_ids("Nothing does.")
    marks = changed_spans(ids, taught.encoder.answer_ids(nothing.rejected))
    nothing = dataclasses.replace(
        nothing, chosen_changed=marks[0], rejected_changed=marks[1], chosen_ref=[-1.0] * len(ids)
    )
    made = collate(taught, data[0], 2000, masks)([nothing, texts[0]])
    assert made.batch.row_of_target.tolist() == [1, 1]
    assert made.target_of_pair.tolist() == [1]
    with torch.no_grad():
        loss, _ = align_loss(PARAMS, WEIGHTS)(taught, made)
    assert torch.isfinite(loss)


def test_a_batch_moves_as_a_whole(
    taught: Segmenter, data: Data, texts: list[TextPair], masks: MaskPairs
) -> None:
    made = collate(taught, data[0], 2000, masks)(texts).to("meta")
    assert made.batch.images.device.type == "meta"
    assert made.reference.device.type == made.pairs.winner.device.type == "meta"
    assert made.pairs.uids == masks.uids[:2]
