"""Masks with the true answers fed, as LISA and PixelLM measure them (`peers.py` says where)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from popen.data.images import open_image
from popen.evaluation.answering import resize_logits
from popen.evaluation.peers import TEACHER_FORCED, Figures
from popen.masks import decode
from popen.model.batches import Row
from popen.model.segmenter import Segmenter
from popen.samples import Sample

Overlap = tuple[int, int]  # of a target's masks: pixels of the intersection, and of the union


def overlaps(model: Segmenter, root: Path, samples: Sequence[Sample], max_pixels: int) -> list[Overlap]:
    """The true targets of a batch of questions against the masks that the model makes for them.

    The i-th mask (logit > 0, where the peers cut, at the image's size) is held against the i-th target;
    pixels of the ignore region are left out. A question without targets has nothing.
    """
    asked = [sample for sample in samples if sample.targets]
    found = list[Overlap]()
    for sample, logits in zip(asked, _logits(model, root, asked, max_pixels) if asked else (), strict=True):
        predicted = resize_logits(logits, sample.height, sample.width).cpu() > 0
        true = torch.stack([torch.from_numpy(decode(target.rle)) for target in sample.targets])
        if sample.ignore is not None:
            counted = ~torch.from_numpy(decode(sample.ignore))
            predicted, true = predicted & counted, true & counted
        both, either = (part.flatten(1).sum(1).tolist() for part in (predicted & true, predicted | true))
        found += zip(both, either, strict=True)
    return found


def figures(found: Sequence[Overlap]) -> Figures:
    """gIoU: mean over targets, 1 where both masks are empty; cIoU: sum of intersections over sum of unions.
    None where there is nothing to divide by."""
    ious = [both / either if either else 1.0 for both, either in found]
    union = sum(either for _, either in found)
    mean = sum(ious) / len(ious) if ious else None
    whole = sum(both for both, _ in found) / union if union else None
    return dict(zip(TEACHER_FORCED, (mean, whole), strict=True))


def write_overlaps(path: Path, found: Sequence[Overlap]) -> None:
    path.write_text(json.dumps(found), encoding="utf-8")


def read_overlaps(path: Path) -> list[Overlap]:
    return [(both, either) for both, either in json.loads(path.read_text(encoding="utf-8"))]


@torch.no_grad()
def _logits(model: Segmenter, root: Path, samples: Sequence[Sample], max_pixels: int) -> Sequence[Tensor]:
    """Mask logits (n, H, W) of each sample's targets, from one forward over the true answers."""
    images = sorted({sample.image for sample in samples})
    rows = [
        Row(images.index(s.image), s.question, s.answer, [decode(target.rle) for target in s.targets])
        for s in samples
    ]
    data = model.encoder.batch([open_image(root, image, max_pixels) for image in images], rows)
    return model(data.to(model.device)).masks.float().split([len(sample.targets) for sample in samples])
