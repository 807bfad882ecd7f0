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
from popen.model.batches import Row
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
    encoded, features, embeddings, own = [], [], [], []
    kinds, shared = list[str](), list[bool]()
    for start in tqdm(range(0, len(asked), batch), desc="class means", unit="batch", mininterval=2.0):
        part = asked[start : start + batch]
        rows = [Row(i, s.question, s.answer, [decode(t.rle) for t in s.targets]) for i, s in enumerate(part)]
        images = [open_image(root, s.image, max_pixels) for s in part]
        encoded.append(model.encoder.batch(images, rows).to(model.device))
        features.append(model.tower(encoded[-1].images))
        output = model(encoded[-1], features[-1])
        embeddings.append(output.embeddings)
        own.append(_ious(output.masks > threshold, encoded[-1].masks))
        for sample in part:
            twins = _twins(sample)
            kinds += [target.category for target in sample.targets]
            shared += [target.category in twins for target in sample.targets]
    every = torch.cat(embeddings)
    by_kind = {kind: every[[k == kind for k in kinds]].mean(0) for kind in set(kinds)}
    swapped = torch.stack([by_kind[kind] for kind in kinds]).split([len(e) for e in embeddings])
    meant = [
        _ious(model.decode(e, levels, data.images, data.image_of_target) > threshold, data.masks)
        for data, levels, e in zip(encoded, features, swapped, strict=True)
    ]
    counted = torch.tensor(shared)
    iou, mean = (float(torch.cat(parts).cpu()[counted].mean()) for parts in (own, meant))
    return {"targets": float(sum(shared)), "iou": iou, "iou_class_mean": mean, "drop": iou - mean}


def _ious(masks: Tensor, true: Tensor) -> Tensor:
    """Masks (N, H, W) and the true ones -> (N,)."""
    truth = true > 0
    joint = (masks | truth).flatten(1).sum(1)
    return (masks & truth).flatten(1).sum(1) / joint.clamp(min=1)


def _twins(sample: Sample) -> set[str]:
    """Kinds of targets that the image holds more than once."""
    present = Counter(thing.category for thing in sample.objects)
    return {target.category for target in sample.targets if present[target.category] > 1}
