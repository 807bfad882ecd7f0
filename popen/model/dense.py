"""The dense auxiliary: which kind of thing every pixel shows. It teaches a small tower to see (ours).

At the default scale it trains the tower alone first (`pretrain_vision`), then beside the SFT loss. A tower
that learns kinds alone forgets colours, so there it also paints the picture from its deepest features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from popen.devices import share
from popen.masks import Mask, decode
from popen.model import IGNORED
from popen.model.decoder import Neck
from popen.model.tally import Centres
from popen.model.vision import Tower
from popen.params import ModelParams
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


@dataclass(frozen=True)
class Pixels:
    """A batch for DenseTower: images (B, 3, H, W) in [0, 1], labels (B, H, W) and centres
    (B, categories, h, w) as `centre_labels` makes them."""

    images: Tensor
    labels: Tensor
    centres: Tensor

    @classmethod
    def of(
        cls,
        images: Sequence[NDArray[np.uint8]],
        labels: Sequence[NDArray[np.int64]],
        centres: Sequence[NDArray[np.int64]],
    ) -> Pixels:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return cls(pixels, torch.from_numpy(np.stack(labels)), torch.from_numpy(np.stack(centres)))

    def to(self, device: torch.device | str) -> Pixels:
        return Pixels(self.images.to(device), self.labels.to(device), self.centres.to(device))


def paint_loss(painted: Tensor, images: Tensor) -> Tensor:
    """Share of the images' variance (each channel's over the batch) that is not painted (ours).

    painted (B, 3, h, w), images (B, 3, H, W) in [0, 1], compared at (h, w). Zero for plain images.
    """
    small = F.interpolate(images, size=painted.shape[-2:], mode="area")
    spread = (small - small.mean((0, 2, 3), keepdim=True)).square().mean()
    return (painted.float() - small).square().mean() / spread.clamp(min=1e-6)


class DenseTower(nn.Module):
    """Tower, neck and dense head alone; their weights have the names that the Segmenter gives them.

    `paint` is only needed here: a linear map of each of the deepest features to the colours of its cell,
    at half the image's resolution.
    """

    def __init__(self, params: ModelParams, categories: Sequence[str]) -> None:
        super().__init__()
        self.tower = Tower(params.vision)
        side = max(1, params.vision.image_size // self.tower.grids[0] // 2)
        self.paint = nn.Sequential(nn.Conv2d(self.tower.widths[0], 3 * side**2, 1), nn.PixelShuffle(side))
        self.neck = Neck(self.tower.widths, self.tower.grids, params.decoder.width)
        self.dense = dense_head(params.decoder.width, len(categories))
        self.centres = Centres(self.tower.widths, len(categories))
        self.to(memory_format=torch.channels_last)  # as the Segmenter's

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, 1 + categories, h, w), the painted images (B, 3, h', w') and the map of
        centres (B, categories, h'', w'')."""
        features = self.tower(images)
        return self.dense(self.neck(features)[-1]), self.paint(features[0]), self.centres(features)

    def shared(self) -> dict[str, Tensor]:
        """The weights that a Segmenter has too."""
        state = self.state_dict().items()
        return {name: value.contiguous() for name, value in state if not name.startswith("paint.")}


@torch.no_grad()
def dense_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Shares of the labelled pixels, and of those that show a thing, that are named right."""
    named = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear").argmax(1)
    right, things = (named == labels), labels > 0
    known = (labels != IGNORED).sum().clamp(min=1)
    return float(right.sum() / known), float((right & things).sum() / things.sum().clamp(min=1))
