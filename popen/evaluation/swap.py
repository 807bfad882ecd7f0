"""Is the segmentation embedding more than a class code? Swap it for its class mean: what is lost? (Ours.)

Where one object of a kind is in an image, the class mean finds it as well. Where two share a kind, only an
embedding that says *which one* can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from popen.data.images import open_image
from popen.masks import decode
from popen.model.batches import Batch, Row
from popen.model.segmenter import Segmenter
from popen.samples import Sample


@torch.no_grad()
def class_mean_swap(
    model: Segmenter, root: Path, samples: Sequence[Sample], batch: int, max_pixels: int, threshold: float
) -> dict[str, float]:
    """IoU of targets that share their kind with another object, with own embedding and with the class mean.

    The true answers are fed. Returns {"targets", "iou", "iou_class_mean", "drop"}; IoUs in 0..1 at the
    model's mask size; {"targets": 0.0} alone where no target shares its kind.
    """
    asked = [sample for sample in samples if sample.targets]
    if not any(_twins(sample) for sample in asked):
        return {"targets": 0.0}
    starts = range(0, len(asked), batch)

    def read(start: int) -> Batch:
        part = asked[start : start + batch]
        rows = [Row(i, s.question, s.answer, [decode(t.rle) for t in s.targets]) for i, s in enumerate(part)]
        images = [open_image(root, s.image, max_pixels) for s in part]
        return model.encoder.batch(images, rows).to(model.device)

    # read twice: kept, the features of a published benchmark's questions fill any device
    embeddings, own, meant = list[Tensor](), list[Tensor](), list[Tensor]()
    for start in tqdm(starts, desc="own embeddings", unit="batch", mininterval=2.0):
        data = read(start)
        output = model(data)
        embeddings.append(output.embeddings.float())
        own.append(_ious(output.masks > threshold, data.masks))
    kinds = [target.category for sample in asked for target in sample.targets]
    every = torch.cat(embeddings)
    by_kind = {kind: every[[k == kind for k in kinds]].mean(0) for kind in set(kinds)}
    swapped = torch.stack([by_kind[kind] for kind in kinds]).split([len(e) for e in embeddings])
    for start, mean in zip(
        tqdm(starts, desc="class means", unit="batch", mininterval=2.0), swapped, strict=True
    ):
        data = read(start)
        masks = model.decode(mean, model.tower(data.images), data.images, data.image_of_target)
        meant.append(_ious(masks > threshold, data.masks))
    counted = torch.tensor(
        [target.category in _twins(sample) for sample in asked for target in sample.targets]
    )
    iou, with_mean = (float(torch.cat(parts).cpu()[counted].mean()) for parts in (own, meant))
    return {
        "targets": float(counted.sum()),
        "iou": iou,
        "iou_class_mean": with_mean,
        "drop": iou - with_mean,
    }


def _ious(masks: Tensor, true: Tensor) -> Tensor:
    """Masks (N, H, W) and the true ones -> (N,); 1 where both are empty."""
    truth = true > 0
    joint = (masks | truth).flatten(1).sum(1)
    return torch.where(joint > 0, (masks & truth).flatten(1).sum(1) / joint.clamp(min=1), 1.0)


def _twins(sample: Sample) -> set[str]:
    """Kinds of targets that the image holds more than once."""
    present = Counter(thing.category for thing in sample.objects)
    return {target.category for target in sample.targets if present[target.category] > 1}
