"""SFT losses: words, masks, and the dense auxiliary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from popen.model.batches import Batch
from popen.model.dense import dense_loss
from popen.model.segmenter import Output
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
    return F.cross_entropy(logits.float(), batch.labels[:, 1:][batch.answered])


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
    """BCE, with the contested pixels weighted by 1 + refine (PixelLM's target refinement), and Dice."""
    if not len(logits):
        return {"bce": logits.sum(), "dice": logits.sum()}
    claimed = contested(logits, batch.row_of_target, len(batch.input_ids))
    pixel_weights = batch.valid * (1 + weights.refine * claimed)
    return {
        "bce": bce(logits.float(), batch.masks, pixel_weights).mean(),
        "dice": dice(logits.float(), batch.masks, batch.valid).mean(),
    }


def sft_loss(output: Output, batch: Batch, weights: SftWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum and its parts."""
    parts = {"ce": cross_entropy(output.logits, batch), **mask_loss(output.masks, batch, weights)}
    if output.dense is not None and batch.dense is not None and weights.dense:
        parts["dense"] = dense_loss(output.dense, batch.dense)
    total = sum((getattr(weights, name) * value for name, value in parts.items()), torch.zeros(()))
    return total, {name: value.detach() for name, value in parts.items()}
