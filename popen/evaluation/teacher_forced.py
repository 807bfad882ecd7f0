"""Masks with the true answers fed, as LISA and PixelLM measure them (`peers.py` says where)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from popen.data.images import open_image
from popen.evaluation.answering import resize_logits
from popen.evaluation.peers import TEACHER_FORCED, Figures
from popen.masks import decode
from popen.model.batches import Row
from popen.model.segmenter import Segmenter
from popen.samples import Sample


def teacher_forced(
    model: Segmenter, root: Path, samples: Sequence[Sample], batch: int, max_pixels: int, name: str
) -> Figures:
    """gIoU and cIoU over the true targets of `samples`; None where there is no target.

    The i-th mask (logit > 0, where the peers cut, at the image's size) is held against the i-th target;
    pixels of the ignore region are left out. gIoU: mean over targets, 1 where both masks are empty; cIoU:
    sum of intersections over sum of unions. A question without targets counts nothing.
    """
    asked = [sample for sample in samples if sample.targets]
    if not asked:
        return dict.fromkeys(TEACHER_FORCED)
    shared, joint = list[Tensor](), list[Tensor]()
    with tqdm(total=len(asked), desc=f"{name} teacher-forced", unit="question", mininterval=2.0) as bar:
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            for sample, logits in zip(part, _logits(model, root, part, max_pixels), strict=True):
                predicted = resize_logits(logits, sample.height, sample.width).cpu() > 0
                true = torch.stack([torch.from_numpy(decode(target.rle)) for target in sample.targets])
                if sample.ignore is not None:
                    counted = ~torch.from_numpy(decode(sample.ignore))
                    predicted, true = predicted & counted, true & counted
                shared.append((predicted & true).flatten(1).sum(1))
                joint.append((predicted | true).flatten(1).sum(1))
            bar.update(len(part))
    over, under = torch.cat(shared).double(), torch.cat(joint).double()
    ious = torch.where(under > 0, over / under.clamp(min=1), 1.0)
    values = (float(ious.mean()), float(over.sum() / under.sum()) if under.any() else None)
    return dict(zip(TEACHER_FORCED, values, strict=True))


@torch.no_grad()
def _logits(model: Segmenter, root: Path, samples: Sequence[Sample], max_pixels: int) -> Sequence[Tensor]:
    """Mask logits (n, H, W) of each sample's targets, from one forward over the true answers."""
    images = sorted({sample.image for sample in samples})
    rows = [
        Row(images.index(s.image), s.question, s.answer, [decode(target.rle) for target in s.targets])
        for s in samples
    ]
    data = model.encoder.batch([open_image(root, image, max_pixels) for image in images], rows)
    return model(data.to(model.device)).masks.split([len(sample.targets) for sample in samples])
