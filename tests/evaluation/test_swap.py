"""The class-mean swap against its definition, written out for two targets of one kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from popen.evaluation.swap import _ious, class_mean_swap
from popen.masks import decode
from popen.model.batches import Row
from popen.model.segmenter import Segmenter
from popen.samples import Region, Sample
from tests.conftest import square


def asked(uid: str, target: Region, objects: tuple[Region, ...], folder: Path) -> Sample:
    """A question about one target, with a picture of its own."""
    pixels = np.random.default_rng(len(uid)).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{uid}.png")
    answer = f"It is {target.name} {{seg}}."
    return Sample(uid, "muse", "val", f"{uid}.png", 32, 32, f"{uid}?", answer, (target,), objects)


def test_the_own_embedding_is_compared_with_the_mean_of_its_kind(
    mini_model: Segmenter, tmp_path: Path
) -> None:
    left, right = square(2, 2, 12), square(18, 16, 12)
    fork = replace(square(4, 18, 8), name="the fork", category="fork")
    samples = [
        asked("a", left, (left, right), tmp_path),
        asked("bb", right, (left, right), tmp_path),
        asked("ccc", fork, (left, right, fork), tmp_path),  # the only fork: not among the figures
    ]
    own, decoded = [], []
    for sample in samples[:2]:
        image = Image.open(tmp_path / sample.image)
        row = Row(0, sample.question, sample.answer, [decode(sample.targets[0].rle)])
        batch = mini_model.encoder.batch([image], [row])
        with torch.no_grad():
            output, features = mini_model(batch), mini_model.tower(batch.images)
        own.append(output.embeddings)
        decoded.append((output.masks, features, batch))
    threshold = float(torch.cat([masks for masks, _, _ in decoded]).median())  # half of the pixels are set
    mean = torch.cat(own).mean(0, keepdim=True)
    expected: dict[str, list[float]] = {"iou": [], "iou_class_mean": []}
    for masks, features, batch in decoded:
        with torch.no_grad():
            swapped = mini_model.decode(mean, features, batch.images, batch.image_of_target)
        for name, logits in (("iou", masks), ("iou_class_mean", swapped)):
            predicted, true = logits > threshold, batch.masks > 0
            expected[name].append(float((predicted & true).sum() / (predicted | true).sum()))

    found = class_mean_swap(mini_model, tmp_path, samples, 2, 10_000, threshold)

    assert found["targets"] == 2
    assert found["iou"] == pytest.approx(np.mean(expected["iou"]), abs=1e-4)
    assert found["iou_class_mean"] == pytest.approx(np.mean(expected["iou_class_mean"]), abs=1e-4)
    assert found["drop"] == pytest.approx(found["iou"] - found["iou_class_mean"])
    assert found["iou"] != found["iou_class_mean"]


def test_two_empty_masks_agree() -> None:
    empty, full = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4)
    assert _ious(torch.cat([empty, empty]), torch.cat([empty.float(), full])).tolist() == [1.0, 0.0]


def test_nothing_is_measured_where_every_kind_is_there_once(mini_model: Segmenter, tmp_path: Path) -> None:
    cup = square(2, 2, 12)
    assert class_mean_swap(mini_model, tmp_path, [asked("a", cup, (cup,), tmp_path)], 2, 10_000, 0.0) == {
        "targets": 0.0
    }
    assert class_mean_swap(mini_model, tmp_path, [], 2, 10_000, 0.0) == {"targets": 0.0}
