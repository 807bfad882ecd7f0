"""The dense auxiliary: which kind of thing every pixel shows. It teaches a small tower to see (ours).

At the default scale it trains the tower first (`popen.model.sight`), then beside the SFT loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from popen.devices import share
from popen.masks import Mask, decode
from popen.model import IGNORED
from popen.samples import Sample


def image_array(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """RGB image -> (size, size, 3); the aspect is not kept, as in CLIP's "squash" preprocessing."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def mask_array(mask: Mask, size: int) -> Mask:
    """Mask (h, w) -> (size, size): a pixel is set when at least half of its area is."""
    if mask.shape == (size, size):
        return mask
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX)
    return np.asarray(resized) >= 128


def categories_of(samples: Iterable[Sample]) -> list[str]:
    """Every kind that is annotated in the images, sorted."""
    return sorted({thing.category for sample in samples for thing in sample.objects if thing.category})


def dense_labels(sample: Sample, categories: Sequence[str], size: int) -> NDArray[np.int64]:
    """Class of every pixel (size, size): 0 background, 1 + index in `categories`; smaller things on top.

    What no object covers is IGNORED, not background, where the data set does not annotate the whole image.
    """
    labels = np.full((size, size), 0 if sample.annotates_all else IGNORED, dtype=np.int64)
    decoded = [(mask_array(decode(thing.rle), size), thing.category) for thing in sample.objects]
    for mask, category in sorted(decoded, key=lambda pair: -int(pair[0].sum())):
        labels[mask] = 1 + categories.index(category) if category in categories else IGNORED
    return labels


def dense_head(width: int, categories: int) -> nn.Sequential:
    """Features (B, C, h, w) -> logits (B, 1 + categories, 2h, 2w)."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width // 2, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(width // 2, 1 + categories, 1),
    )


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-pixel cross-entropy of logits (B, classes, h, w) against labels (B, H, W), compared at (H, W).

    Zero where no pixel of the batch is labelled.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear")
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum()
    return total / count.clamp(min=1) * share(count)


@torch.no_grad()
def dense_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Shares of the labelled pixels, and of those that show a thing, that are named right."""
    named = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear").argmax(1)
    right, things = (named == labels), labels > 0
    known = (labels != IGNORED).sum().clamp(min=1)
    return float(right.sum() / known), float((right & things).sum() / things.sum().clamp(min=1))
