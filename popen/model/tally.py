"""How many things of a kind there are, how they lie and how they look, told to the image's tokens (ours, for
language models from scratch).

A language model reads an image by attention, which takes means, and a mean does not count: three cups look
like one. A small language model does not learn around that; docs/experiments.md has the measurement. So a
head on the tower finds the centre of each thing, the centres of each kind are counted and measured, and every
token is told what was found of the kind that it shows: what all tokens of a kind say, a mean over them says
too. How large what it shows is for its kind and which colour it has, it is told as well: a tower that learns
kinds keeps little of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from popen.devices import share
from popen.masks import decode
from popen.model import IGNORED
from popen.samples import Sample

COUNTED = (2, 3, 4)  # a token is told whether there are at least so many of its kind
MOST = 5  # of a kind whose places are looked at
KNOWN = len(COUNTED) + 3  # of a kind: and how its things lie
FACTS = KNOWN + 5  # and how much of any thing it shows, how large that is for its kind, and its colour (3)
INNER = 128
LOUD = 3.0  # a token's own features are about as large
SURE = 0.35  # a peak of the map is a thing from about this probability


def centre_labels(sample: Sample, categories: Sequence[str], grid: int) -> NDArray[np.int64]:
    """1 where the centre of a thing's visible pixels lies, else 0: (categories, grid, grid).

    All IGNORED where the data set does not annotate the whole image.
    """
    if not sample.annotates_all:
        return np.full((len(categories), grid, grid), IGNORED, dtype=np.int64)
    labels = np.zeros((len(categories), grid, grid), dtype=np.int64)
    for thing in sample.objects:
        mask = decode(thing.rle)
        rows, columns = np.nonzero(mask)
        if len(rows) and thing.category in categories:
            y, x = (rows.mean() + 0.5) / mask.shape[0], (columns.mean() + 0.5) / mask.shape[1]
            labels[categories.index(thing.category), int(y * grid), int(x * grid)] = 1
    return labels


class Centres(nn.Module):
    """The tower's coarsest and finest features -> a map of the things' centres for each kind."""

    def __init__(self, widths: Sequence[int], categories: int) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(widths[0], INNER, 1), nn.Conv2d(widths[-1], INNER, 1)
        self.norm = nn.GroupNorm(8, INNER)
        self.mix = nn.Conv2d(INNER, INNER, 3, padding=1)
        self.out = nn.Conv2d(INNER, categories, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, -4.0)  # nearly every cell is nobody's centre

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[(B, width, h, w)] coarse to fine -> logits (B, categories, h', w') on the finest level's cells."""
        fine = self.fine(features[-1])
        coarse = F.interpolate(self.coarse(features[0]), size=fine.shape[-2:], mode="bilinear")
        mixed = F.gelu(self.mix(F.gelu(self.norm(fine + coarse))))
        with torch.autocast(fine.device.type, enabled=False):  # in bfloat16 a peak ties with its slope
            return self.out(mixed.float())


def centre_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, exponent 2) a centre, (B, categories, h, w) against labels in {0, 1}.

    Zero where no image of the batch is labelled.
    """
    known, true = (labels != IGNORED).float(), (labels == 1).float()
    wrong = (logits.detach().float().sigmoid() - true).abs().square()
    loss = F.binary_cross_entropy_with_logits(logits.float(), true, weight=wrong * known, reduction="sum")
    count = true.sum()
    return loss / count.clamp(min=1) * share(count)


def peaks(probability: Tensor) -> Tensor:
    """Map of centres (B, categories, h, w) -> at each peak how surely it is a thing, elsewhere 0."""
    highest = probability == F.max_pool2d(probability, 3, stride=1, padding=1)
    return ((probability - SURE) * 14).sigmoid() * (highest & (probability > SURE / 2))


def counts(logits: Tensor) -> Tensor:
    """Map of centres (B, categories, h, w) -> how many of each kind (B, categories)."""
    return peaks(logits.float().sigmoid()).sum((2, 3))


def census(logits: Tensor) -> Tensor:
    """Map of centres (B, categories, h, w) -> what there is to tell of each kind (B, categories, KNOWN).

    Whether there are at least two, three, four; how far they reach from left to right (in quarters of the
    image) and from top to bottom; and the smallest step from one to the next on its right (in eighths). All
    between 0 and about 1.
    """
    probability = logits.float().sigmoid()
    sure = peaks(probability)
    at_least = [((sure.sum((2, 3)) - number + 0.5) * 8).sigmoid() for number in COUNTED]
    sizes, places = sure.flatten(2).topk(MOST)
    real = sizes > 0.5
    # a centre lies between the cells' own: at the mean of the map around it
    mass = F.avg_pool2d(probability, 3, stride=1, padding=1) + 1e-6
    x, y = (
        (F.avg_pool2d(probability * at, 3, stride=1, padding=1) / mass).flatten(2).gather(2, places)
        for at in _axes(probability)
    )
    reach = [
        (t.masked_fill(~real, -9).amax(2) - t.masked_fill(~real, 9).amin(2)).clamp(min=0) for t in (x, y)
    ]
    in_order = x.masked_fill(~real, 9).sort(2).values  # those that are not real come last
    steps = in_order.diff(dim=2).masked_fill(in_order[..., 1:] > 2, 9).amin(2)
    step = steps.masked_fill(steps > 2, 0)
    lie = [(t * scale).clamp(max=1.5) for t, scale in zip([*reach, step], (4, 4, 8), strict=True)]
    return torch.stack([*at_least, *lie], dim=-1)


def _axes(of: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, w) and y (h, 1) of the cells, in parts of the image."""
    y, x = ((torch.arange(n, device=of.device) + 0.5) / n for n in of.shape[-2:])
    return x[None], y[:, None]


@torch.no_grad()
def observed(images: Tensor, dense: Tensor, centres: Tensor, grid: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], logits of what their pixels show (B, 1 + categories, h, w) and of the
    centres (B, categories, h', w') -> the `facts` of grid x grid tokens (B, grid grid, FACTS).

    They are read off: no gradient of the words reaches what counts.
    """
    kinds = dense.float().softmax(1)[:, 1:]
    shares = F.adaptive_avg_pool2d(kinds, grid).flatten(2)
    return facts(census(centres), shares, colours(images, kinds.sum(1), grid))


def facts(known: Tensor, shows: Tensor, looks: Tensor) -> Tensor:
    """What is known of each kind (B, categories, KNOWN), the share of each kind in what a token shows
    (B, categories, P) and `colours` (B, P, 3) -> what the tokens are told (B, P, FACTS)."""
    told = torch.einsum("bkp,bkf->bpf", shows, known)
    side = round(shows.shape[2] ** 0.5)
    about = F.avg_pool2d(shows.unflatten(2, (side, side)), 3, stride=1, padding=1).flatten(2)
    size = (shows * about / about.amax(2, keepdim=True).clamp(min=1e-3)).sum(1)
    return LOUD * torch.cat([told, shows.sum(1).unsqueeze(-1), size.unsqueeze(-1), looks], dim=-1)


def colours(images: Tensor, things: Tensor, grid: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] and how surely each place shows a thing (B, h, w) -> the colours of what
    the tokens show of things (B, grid grid, 3), from -1 to 1 and in proportion to how much that is."""
    small = 2 * F.interpolate(images, things.shape[-2:], mode="area") - 1
    return F.adaptive_avg_pool2d(small * things[:, None], grid).flatten(2).transpose(1, 2)


@torch.no_grad()
def count_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Of the kinds that an image shows or is said to show, the share counted right; labels as for
    `centre_loss`."""
    known = (labels != IGNORED).all((2, 3))
    found, true = counts(logits).round()[known], (labels == 1).sum((2, 3))[known]
    named = (found > 0) | (true > 0)
    return float(((found == true) & named).sum() / named.sum().clamp(min=1))
