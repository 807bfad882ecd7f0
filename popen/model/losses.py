"""SFT losses: words, masks, and the dense auxiliary.

Means are over what all processes of a training have (`popen.devices.share`; one process: its own).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from popen.devices import share
from popen.model import IGNORED
from popen.model.batches import Batch
from popen.model.dense import dense_loss
from popen.model.look import aim_loss, look_loss, match_loss
from popen.model.segmenter import Output
from popen.model.tally import centre_loss
from popen.params import SftWeights


def token_logps(logits: Tensor, batch: Batch) -> Tensor:
    """log p of every answer token, (A, V) -> (R, T); 0 outside the answers."""
    answered = batch.answered
    labels = batch.labels[:, 1:][answered]
    picked = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    placed = torch.zeros(answered.shape, device=picked.device).masked_scatter(answered, picked)
    return F.pad(placed, (1, 0))


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over the answers' tokens, (A, V) -> ()."""
    labels = batch.labels[:, 1:][batch.answered]
    return F.cross_entropy(logits.float(), labels) * share(len(labels))


def dice(logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice loss of each target, (N, H, W) -> (N,); 1 is added to both counts (two empty masks: 0)."""
    probs = logits.sigmoid() * valid
    masks = masks * valid
    joint = (probs * masks).flatten(1).sum(1)
    return 1 - (2 * joint + 1) / (probs.flatten(1).sum(1) + masks.flatten(1).sum(1) + 1)


def bce(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the per-pixel binary cross-entropy of each target, (N, H, W) -> (N,)."""
    loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="none") * weights
    return loss.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=1)


def contested(logits: Tensor, row_of_target: Tensor, rows: int) -> Tensor:
    """Pixels that two or more targets of the same row claim, (N, H, W) -> float (N, H, W)."""
    claims = (logits.detach() > 0).float()
    per_row = torch.zeros((rows, *claims.shape[1:]), device=claims.device).index_add_(
        0, row_of_target, claims
    )
    return (per_row >= 2).float()[row_of_target]


def mask_loss(logits: Tensor, batch: Batch, weights: SftWeights) -> dict[str, Tensor]:
    """BCE, with the contested pixels weighted by 1 + refine (PixelLM's target refinement), and Dice, of the
    drawn targets."""
    part = share(len(logits))
    if not len(logits):
        return {"bce": logits.sum(), "dice": logits.sum()}
    masks, valid, rows = (batch.of_drawn(part) for part in (batch.masks, batch.valid, batch.row_of_target))
    claimed = contested(logits, rows, len(batch.input_ids))
    pixel_weights = valid * (1 + weights.refine * claimed)
    return {
        "bce": bce(logits.float(), masks, pixel_weights).mean() * part,
        "dice": dice(logits.float(), masks, valid).mean() * part,
    }


def describe_loss(described: Tensor, batch: Batch) -> Tensor:
    """What and where a target is, read off its embedding by one linear map (ours, for models from scratch).

    The hidden state of a codebook token has to hold both, and the mask alone is a weak teacher of a
    language model that does not yet look back at the words before. (N, S, 1 + categories + 3): logits of
    the kind (the dense label of most of its pixels), then centre x, y and root of the area, all in 0..1.
    """
    if batch.dense is None:
        return described.sum() * 0
    part = share(len(described))
    if not len(described):
        share(0)
        return described.sum() * 0
    labels = batch.dense[batch.image_of_target].flatten(1)
    masks, size = batch.masks.flatten(1), batch.masks.shape[-1]
    votes = torch.zeros((len(masks), described.shape[-1] - 3), device=masks.device)
    votes = votes.scatter_add(1, labels.clamp(min=0), masks * (labels > 0))
    kinds = torch.where(votes.sum(1) > 0, votes.argmax(1), IGNORED)
    at = torch.linspace(0, 1, size, device=masks.device)
    areas = masks.sum(1).clamp(min=1)
    x = (batch.masks.sum(1) @ at) / areas
    y = (batch.masks.sum(2) @ at) / areas
    where = torch.stack([x, y, areas.sqrt() / size], dim=1)[:, None].expand(-1, described.shape[1], -1)
    logits, placed = described[..., :-3].float(), described[..., -3:].float()
    scales = logits.shape[1]
    named = F.cross_entropy(
        logits.flatten(0, 1), kinds.repeat_interleave(scales), ignore_index=IGNORED, reduction="sum"
    )
    known = (kinds != IGNORED).sum()
    count = known.clamp(min=1) * scales
    return named / count * share(known) + 4 * F.l1_loss(placed, where) * part


def point_loss(looked: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of where a target's embedding looks, (N, S, h w) logits, against its mask's share of
    each cell (ours). A target without a pixel counts as 0."""
    part = share(len(looked))
    if not len(looked):
        return looked.sum()
    grid = round(looked.shape[-1] ** 0.5)
    shares = F.adaptive_avg_pool2d(batch.masks * batch.valid, grid).flatten(1)
    shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-6)
    return -(shares[:, None] * looked.float().log_softmax(-1)).sum(-1).mean() * part


def inventory_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """Which kinds the answer names and how many of each, read off the prompt's last state (ours).

    A language model from scratch learns to speak before it learns to choose, and names what stands out in
    the image. This asks for the choice before the first word. logits (R, categories, n): at least one of
    the kind, at least two, ... at least n; counts (R, categories), IGNORED where unknown. Binary
    cross-entropy, summed over what is asked of a row.
    """
    steps = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    known = (counts != IGNORED).unsqueeze(-1).expand_as(logits)
    true = (counts.unsqueeze(-1) >= steps).float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), true, weight=known.float(), reduction="sum")
    count = known[:, 0, 0].sum()
    return loss / count.clamp(min=1) * share(count)


def sft_loss(output: Output, batch: Batch, weights: SftWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum and its parts."""
    parts = {"ce": cross_entropy(output.logits, batch), **mask_loss(output.masks, batch, weights)}
    if output.dense is not None and batch.dense is not None and weights.dense:
        parts["dense"] = dense_loss(output.dense, batch.dense)
    if output.described is not None and weights.describe:
        parts["describe"] = describe_loss(output.described, batch)
    if output.looked is not None and weights.point:
        parts["point"] = point_loss(output.looked, batch)
    if output.inventory is not None and batch.inventory is not None and weights.inventory:
        parts["inventory"] = inventory_loss(output.inventory, batch.inventory)
    if output.centres is not None and batch.centres is not None and weights.centres:
        parts["centres"] = centre_loss(output.centres, batch.centres)
    if output.sought is not None and batch.named is not None and batch.dense is not None and weights.look:
        named = batch.named[:, -output.sought.shape[1] :]
        parts["look"] = look_loss(output.sought, named, batch.image_of_row, batch.dense)
    if output.aimed is not None and batch.aimed is not None and weights.aim:
        aimed = batch.aimed[:, -output.aimed.shape[1] :]
        parts["aim"] = aim_loss(output.aimed, aimed, batch.masks * batch.valid)
    if output.fits is not None and batch.aimed is not None and weights.match:
        parts["match"] = match_loss(output.fits, batch.row_of_target, batch.masks * batch.valid)
    total = sum((getattr(weights, name) * value for name, value in parts.items()), torch.zeros(()))
    return total, {name: value.detach() for name, value in parts.items()}
