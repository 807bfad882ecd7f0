"""What a tower of our own learns before there is a language model, and the pixel decoder with it (ours).

It names every pixel, finds the things' centres, and paints the picture from its deepest features, for a tower
that learns kinds alone forgets colours. And it draws things, each from the mean of the cells that it lies on:
an embedding that looks at a thing later is such a mean, so the decoder knows its trade when SFT begins, and
has learned it without the words, which cost more than the masks do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from popen.masks import Mask, decode
from popen.model.codebook import Pool, cell_shares
from popen.model.decoder import Neck, PixelDecoder
from popen.model.dense import dense_head, dense_labels, mask_array
from popen.model.tally import Centres, centre_labels
from popen.model.vision import Tower
from popen.params import ModelParams
from popen.samples import Sample


@dataclass(frozen=True)
class Pixels:
    """A batch of B images, of which N things are to be drawn."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    labels: Tensor  # (B, H, W), see `dense_labels`
    centres: Tensor  # (B, categories, h, w), see `centre_labels`
    things: Tensor  # (N, H, W) masks
    image_of: Tensor  # (N,) in 0..B-1

    @classmethod
    def of(
        cls,
        images: Sequence[NDArray[np.uint8]],
        samples: Sequence[Sample],
        drawn: Sequence[Sequence[int]],
        categories: Sequence[str],
        grid: int,
    ) -> Self:
        """Images (size, size, 3), a sample of each, the numbers of its objects that are to be drawn, and the
        grid of the map of centres."""
        size = len(images[0])
        things: list[Mask] = [
            mask_array(decode(sample.objects[number].rle), size)
            for sample, numbers in zip(samples, drawn, strict=True)
            for number in numbers
        ]
        return cls(
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(np.stack([dense_labels(sample, categories, size) for sample in samples])),
            torch.from_numpy(np.stack([centre_labels(sample, categories, grid) for sample in samples])),
            torch.from_numpy(np.stack(things)).float(),
            torch.arange(len(drawn)).repeat_interleave(torch.tensor([len(numbers) for numbers in drawn])),
        )

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Seen:
    dense: Tensor  # (B, 1 + categories, h, w) logits
    painted: Tensor  # (B, 3, h', w')
    centres: Tensor  # (B, categories, h'', w'') logits
    masks: Tensor  # (N, H, W) logits


def paint_loss(painted: Tensor, images: Tensor) -> Tensor:
    """Share of the images' variance (each channel's over the batch) that is not painted (ours).

    painted (B, 3, h, w), images (B, 3, H, W) in [0, 1], compared at (h, w). Zero for plain images.
    """
    small = F.interpolate(images, size=painted.shape[-2:], mode="area")
    spread = (small - small.mean((0, 2, 3), keepdim=True)).square().mean()
    return (painted.float() - small).square().mean() / spread.clamp(min=1e-6)


class Sight(nn.Module):
    """Tower, neck, heads and decoder, without a language model.

    `paint` is only needed here: a linear map of each of the deepest features to the colours of its cell,
    at half the image's resolution.
    """

    def __init__(self, params: ModelParams, categories: Sequence[str]) -> None:
        super().__init__()
        size, width = params.vision.image_size, params.decoder.width
        self.tower = Tower(params.vision)
        side = max(1, size // self.tower.grids[0] // 2)
        self.paint = nn.Sequential(nn.Conv2d(self.tower.widths[0], 3 * side**2, 1), nn.PixelShuffle(side))
        self.neck = Neck(self.tower.widths, self.tower.grids, width)
        self.dense = dense_head(width, len(categories))
        self.centres = Centres(self.tower.widths, len(categories))
        self.pool = Pool(width, self.tower.widths[0])
        self.decoder = PixelDecoder(params.decoder, len(params.vision.levels), size)
        self.to(memory_format=torch.channels_last)  # as the Segmenter's

    def forward(self, batch: Pixels) -> Seen:
        features = self.tower(batch.images)
        levels = self.neck(features)
        shares = cell_shares(batch.things, self.tower.grids[0])[:, None].expand(-1, len(levels), -1)
        embeddings = self.pool(self.pool.cells(features[0]), shares, batch.image_of)
        return Seen(
            self.dense(levels[-1]),
            self.paint(features[0]),
            self.centres(features),
            self.decoder(embeddings, levels, batch.images, batch.image_of),
        )

    def shared(self) -> dict[str, Tensor]:
        """The weights that a Segmenter has too, by the names that they have there."""
        return {
            f"codebook.{name}" if name.startswith("pool.") else name: value.contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith("paint.")
        }
