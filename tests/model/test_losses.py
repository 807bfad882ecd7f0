"""SFT losses against arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from popen.model import IGNORED
from popen.model.batches import Batch
from popen.model.losses import (
    bce,
    contested,
    describe_loss,
    dice,
    inventory_loss,
    mask_loss,
    point_loss,
    sft_loss,
)
from popen.model.segmenter import Output
from popen.params import SftWeights

WEIGHTS = SftWeights(
    ce=1.0, bce=2.0, dice=0.5, refine=3.0, dense=0.25, describe=0.5, point=0.0, inventory=0.0
)


def batch(masks: Tensor, rows: list[int], valid: Tensor | None = None) -> Batch:
    """Targets with masks (N, H, W) in a batch of two rows, each with one answer token (1 and 0)."""
    labels = torch.tensor([[IGNORED, 1], [IGNORED, 0]])
    return Batch(
        images=torch.zeros(1, 3, *masks.shape[1:]),
        image_of_row=torch.zeros(2, dtype=torch.long),
        input_ids=torch.zeros(2, 2, dtype=torch.long),
        attention_mask=torch.ones(2, 2, dtype=torch.long),
        labels=labels,
        row_of_target=torch.tensor(rows, dtype=torch.long),
        positions=torch.zeros(len(rows), 1, dtype=torch.long),
        masks=masks,
        valid=torch.ones_like(masks) if valid is None else valid,
    )


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dice_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0]], [[-50.0, -50.0, 50.0]]])
    masks = torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]])
    valid = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 1.0, 0.0]]])
    # first: probabilities 1/2, the last pixel left out: 1 - (2 * 1/2 + 1) / (1 + 1 + 1); second: both empty
    assert dice(logits, masks, valid).tolist() == pytest.approx([1 / 3, 0.0])


def test_bce_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0]], [[3.0, 3.0]]])
    masks = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    weights = torch.tensor([[[1.0, 4.0]], [[0.0, 0.0]]])
    expected = (softplus(-2.0) + 4 * softplus(1.0)) / 5
    assert bce(logits, masks, weights).tolist() == pytest.approx([expected, 0.0])  # no weight at all: nothing


def test_contested_pixels_are_those_that_two_targets_of_a_row_claim() -> None:
    logits = torch.tensor([[[1.0, 1.0, -1.0]], [[-1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]]])
    claimed = contested(logits, torch.tensor([0, 0, 1]), rows=2)
    assert claimed.tolist() == [[[0, 1, 0]], [[0, 1, 0]], [[0, 0, 0]]]


def test_contested_pixels_weigh_more_in_bce_alone() -> None:
    logits = torch.tensor([[[1.0, 1.0]], [[-1.0, 1.0]]])
    masks = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])
    valid = torch.ones(2, 1, 2)
    parts = mask_loss(logits, batch(masks, [0, 0]), WEIGHTS)
    one = (softplus(-1.0) + 4 * softplus(-1.0)) / 5  # the second pixel is claimed twice: weight 1 + 3
    other = (softplus(-1.0) + 4 * softplus(1.0)) / 5
    assert float(parts["bce"]) == pytest.approx((one + other) / 2)
    assert float(parts["dice"]) == pytest.approx(float(dice(logits, masks, valid).mean()))
    apart = mask_loss(logits, batch(masks, [0, 1]), WEIGHTS)  # another row's target contests nothing
    assert float(apart["bce"]) == pytest.approx((softplus(-1.0) + (softplus(-1.0) + softplus(1.0)) / 2) / 2)


def test_masks_that_are_not_drawn_change_nothing() -> None:
    masks = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    logits = torch.tensor([[[1.0, 1.0]], [[-1.0, 1.0]]])
    drawn = replace(batch(masks, [0, 1, 1]), drawn=torch.tensor([True, False, True]))
    alone = batch(masks[[0, 2]], [0, 1])
    assert mask_loss(logits, drawn, WEIGHTS) == mask_loss(logits, alone, WEIGHTS)


def test_ignored_pixels_change_nothing() -> None:
    masks, valid = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
    first = mask_loss(torch.tensor([[[0.5, -9.0]]]), batch(masks, [0], valid), WEIGHTS)
    second = mask_loss(torch.tensor([[[0.5, 9.0]]]), batch(masks, [0], valid), WEIGHTS)
    assert first == second


def test_the_sum_is_weighted_and_the_dense_part_optional() -> None:
    supervised = batch(torch.tensor([[[1.0, 0.0]]]), [1])
    words = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    output = Output(words, torch.zeros(1, 1, 4), torch.tensor([[[1.0, 2.0]]]))
    total, parts = sft_loss(output, supervised, WEIGHTS)
    assert set(parts) == {"ce", "bce", "dice"}
    assert float(parts["ce"]) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    expected = parts["ce"] + 2.0 * parts["bce"] + 0.5 * parts["dice"]
    assert float(total) == pytest.approx(float(expected))

    dense = replace(supervised, dense=torch.tensor([[[0, 1]]]))
    logits = torch.log(torch.tensor([0.5, 0.5])).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    more, parts = sft_loss(replace(output, dense=logits), dense, WEIGHTS)
    assert float(parts["dense"]) == pytest.approx(math.log(2))
    assert float(more - total) == pytest.approx(0.25 * math.log(2))
    off = WEIGHTS.model_copy(update={"dense": 0.0})
    assert "dense" not in sft_loss(replace(output, dense=logits), dense, off)[1]


def test_a_batch_without_targets_has_a_mask_loss_of_zero_that_can_be_differentiated() -> None:
    logits = torch.zeros(0, 2, 2, requires_grad=True)
    parts = mask_loss(logits, batch(torch.zeros(0, 2, 2), []), WEIGHTS)
    assert [float(part.detach()) for part in parts.values()] == [0.0, 0.0]
    (parts["bce"] + parts["dice"]).backward()
    assert logits.grad is not None


def test_describe_loss_by_hand() -> None:
    """Kind: the dense label of most of the target's pixels; place: centre and root of the area, 0..1."""
    masks = torch.zeros(1, 3, 3)
    masks[0, 0, 1:] = 1.0  # centre x 0.75, y 0; area 2
    labels = torch.tensor([[[0, 2, 2], [1, 1, 1], [1, 1, 1]]])
    supervised = replace(batch(masks, [0]), dense=labels)
    right = torch.tensor([0.75, 0.0, math.sqrt(2) / 3])
    kinds = torch.log(torch.tensor([0.2, 0.3, 0.5]))
    described = torch.cat([kinds, right]).view(1, 1, 6)
    assert float(describe_loss(described, supervised)) == pytest.approx(-math.log(0.5))
    moved = torch.cat([kinds, right + torch.tensor([0.3, 0.0, 0.0])]).view(1, 1, 6)
    assert float(describe_loss(moved, supervised)) == pytest.approx(-math.log(0.5) + 4 * 0.1, rel=1e-5)
    unknown = replace(supervised, dense=torch.full((1, 3, 3), IGNORED))
    assert float(describe_loss(described, unknown)) == pytest.approx(0.0, abs=1e-6)
    none = replace(supervised, masks=torch.zeros(0, 3, 3), row_of_target=torch.zeros(0, dtype=torch.long))
    assert float(describe_loss(torch.zeros(0, 1, 6), none)) == 0.0


def test_point_loss_by_hand() -> None:
    """Cross-entropy against each cell's share of the mask, ignored pixels left out; scales are averaged."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :2, :2] = 1.0  # the first cell of a 2 x 2 grid, all of it ...
    masks[0, 2:, 2] = 1.0  # ... and half of the last: shares 2/3 and 1/3
    valid = torch.ones_like(masks)
    looked = torch.log(torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]]))
    looked = looked[None].expand(2, 2, 4)  # two targets, each with two scales
    supervised = batch(masks, [0, 1], valid)
    scales = [-(2 * math.log(0.4) + math.log(0.3)) / 3, -(2 * math.log(0.1) + math.log(0.4)) / 3]
    # the second target has no pixel: it counts as 0
    assert float(point_loss(looked, supervised)) == pytest.approx(sum(scales) / 4)
    valid[0, 2:] = 0.0
    ignored = batch(masks, [0, 1], valid)
    assert float(point_loss(looked, ignored)) == pytest.approx(-(math.log(0.4) + math.log(0.1)) / 4)
    assert float(point_loss(torch.zeros(0, 2, 4), batch(torch.zeros(0, 4, 4), []))) == 0.0


def test_inventory_loss_by_hand() -> None:
    """Two kinds, counted up to two; the second row is unknown."""
    logits = torch.tensor([[[2.0, -1.0], [0.5, 0.0]], [[9.0, 9.0], [9.0, 9.0]]])
    counts = torch.tensor([[3, 0], [IGNORED, IGNORED]])
    expected = softplus(-2.0) + softplus(1.0) + softplus(0.5) + softplus(0.0)
    assert inventory_loss(logits, counts).item() == pytest.approx(expected)
    assert inventory_loss(logits, torch.full((2, 2), IGNORED)).item() == 0.0
