"""P_s: perturbed images, and preference pairs from the masks they give.

POPEN perturbs the image, ranks the masks by IoU and trains first on (high, low), then on (high, medium). The
kind of noise, the conditions on a pair and the choice of the three are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def noise_rectangles(
    images: Tensor,
    copies: int,
    count: int,
    sigma: float,
    side: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Copies of images with Gaussian noise inside random rectangles.

    One strong rectangle hides a part and leaves the rest whole, which moves the mask; noise all over the
    image mostly does not (measured, ours).

    Args:
        images: (B, 3, H, W) float in 0..1, before the vision tower's normalisation.
        copies: K perturbed copies of each image.
        count: rectangles a copy; each copy has its own. Where two overlap the noise is added once.
        sigma: standard deviation of the noise, as a part of the pixel range.
        side: least and largest height and width of a rectangle, as a part of the image's.
        generator: source of all randomness; draws are made on its device.

    Returns:
        (B * K, 3, H, W), the copies of an image next to each other, clamped to 0..1; pixels outside the
        rectangles are those of the image.

    Raises:
        ValueError: pixels outside 0..1, or sides that are not 0 < low <= high <= 1.
    """
    low, high = side
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"sides of a rectangle must be 0 < low <= high <= 1, not {side}")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise ValueError("images must lie in 0..1; perturb them before the vision tower's normalisation")
    out = images.repeat_interleave(copies, dim=0)
    n, _, height, width = out.shape
    draws = torch.rand(n, count, 4, generator=generator, device=generator.device).to(out.device)
    noise = torch.randn(out.shape, generator=generator, device=generator.device).to(out)
    rows = _intervals(draws[..., 0], draws[..., 1], low, high, height)  # (n, count, H)
    columns = _intervals(draws[..., 2], draws[..., 3], low, high, width)  # (n, count, W)
    inside = (rows[..., :, None] & columns[..., None, :]).any(1)[:, None]  # (n, 1, H, W)
    return torch.where(inside, (out + sigma * noise).clamp(0.0, 1.0), out)


def _intervals(length: Tensor, place: Tensor, low: float, high: float, size: int) -> Tensor:
    """Uniform draws (...) -> bool (..., size): an interval of low..high of `size`, anywhere inside it."""
    pixels = ((low + (high - low) * length) * size).round().clamp(1, size)
    start = (place * (size - pixels + 1)).floor().clamp(max=size - pixels)
    at = torch.arange(size, device=length.device)
    return (at >= start[..., None]) & (at < (start + pixels)[..., None])


@dataclass(frozen=True)
class Ranks:
    """Indices of the candidates that make a target's pairs: stage coarse (high, low), fine (high, medium)."""

    high: int
    low: int
    medium: int | None  # None: only one loser was admissible


def rank(
    ious: Sequence[float],
    areas: Sequence[float],
    margin: float,
    area_ratio: float,
    clean_iou: float | None = None,
) -> Ranks | None:
    """High, medium and low of the K candidate masks of one target.

    A loser is admissible beside a winner when its IoU is lower by `margin` at least and the larger of the two
    areas is at most `area_ratio` times the smaller (so an empty mask is never one); without the second
    condition the model learns to draw larger masks, not better ones. `high` is the best candidate that has an
    admissible loser, `low` its worst admissible loser and `medium`, of those left, the one whose IoU is
    closest to the middle of the two. A medium as bad as `low` is none: fine would repeat coarse.

    Args:
        ious: K values against the true mask.
        areas: K areas in pixels.
        margin: least difference of IoU inside a pair.
        area_ratio: largest ratio of areas inside a pair, >= 1.
        clean_iou: IoU of the prediction from the unperturbed image; where given, a winner must beat it.

    Returns:
        The ranks, or None when the target gives no pair.
    """
    for high in sorted(range(len(ious)), key=lambda k: -ious[k]):
        if clean_iou is not None and ious[high] <= clean_iou:
            return None
        losers = [
            k
            for k in range(len(ious))
            if k != high
            and ious[high] - ious[k] >= margin
            and max(areas[high], areas[k]) <= area_ratio * min(areas[high], areas[k])
        ]
        if losers:
            low = min(losers, key=lambda k: ious[k])
            middle = (ious[high] + ious[low]) / 2
            between = [k for k in losers if ious[k] > ious[low]]
            return Ranks(high, low, min(between, key=lambda k: abs(ious[k] - middle), default=None))
    return None
