"""Masks with the true answers fed: against a forward a question, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from popen.evaluation.peers import TEACHER_FORCED
from popen.evaluation.teacher_forced import figures, overlaps, read_overlaps, write_overlaps
from popen.masks import Mask, decode, encode
from popen.model.batches import Row
from popen.model.segmenter import Segmenter
from popen.samples import Sample


def measured(
    model: Segmenter, root: Path, samples: list[Sample], batch: int = 3
) -> tuple[float | None, float | None]:
    starts = range(0, len(samples), batch)
    found = figures([one for at in starts for one in overlaps(model, root, samples[at : at + batch], 2000)])
    assert tuple(found) == TEACHER_FORCED
    return found["teacher_forced/gIoU"], found["teacher_forced/cIoU"]


@torch.no_grad()
def drawn(model: Segmenter, root: Path, sample: Sample) -> list[Mask]:
    """The masks of the sample's true answer, from a batch of one row."""
    row = Row(0, sample.question, sample.answer, [decode(target.rle) for target in sample.targets])
    with Image.open(root / sample.image) as image:
        logits = model(model.encoder.batch([image.convert("RGB")], [row])).masks
    return [np.asarray(mask) for mask in logits > 0]


def counts(masks: list[Mask], true: list[Mask]) -> list[tuple[int, int]]:
    return [(int((a & b).sum()), int((a | b).sum())) for a, b in zip(masks, true, strict=True)]


def test_every_target_counts_once_whatever_the_batch(
    taught: Segmenter, data: tuple[Path, list[Sample]]
) -> None:
    root, samples = data
    pairs = [
        pair
        for sample in samples
        for pair in counts(drawn(taught, root, sample), [decode(t.rle) for t in sample.targets])
    ]
    assert len(pairs) == 6  # two questions ask for two things
    for batch in (1, 3, 4):
        giou, ciou = measured(taught, root, samples, batch)
        assert giou == pytest.approx(sum(i / u for i, u in pairs) / 6, abs=0.01)
        assert ciou == pytest.approx(sum(i for i, _ in pairs) / sum(u for _, u in pairs), abs=0.01)
        assert giou is not None
        assert giou > 0.3  # the model knows these by heart
    without = replace(samples[0], targets=(), answer="There is no such thing in this image.")
    assert measured(taught, root, [*samples, without], 4) == measured(taught, root, samples, 4)
    assert measured(taught, root, [without]) == (None, None)


def test_the_models_own_words_are_not_asked_for(
    mini_model: Segmenter, data: tuple[Path, list[Sample]]
) -> None:
    """An untrained model would not name a single target, and has its masks measured nevertheless."""
    root, samples = data
    giou, _ = measured(mini_model, root, samples)
    assert giou is not None


def test_at_the_images_size_and_without_ignored_pixels(
    taught: Segmenter, data: tuple[Path, list[Sample]]
) -> None:
    root, samples = data
    (mask,) = drawn(taught, root, samples[1])
    assert 0 < mask.sum() < mask.size
    assert measured(taught, root, [_exact(samples[1], mask)]) == (1.0, 1.0)

    # half of the pixels wrong on purpose, and all of those ignored
    wrong = mask.copy()
    wrong[16:] = ~wrong[16:]
    half = np.zeros_like(mask)
    half[16:] = True
    assert measured(taught, root, [_exact(samples[1], wrong)])[0] < 1.0  # type: ignore[operator]
    assert measured(taught, root, [replace(_exact(samples[1], wrong), ignore=encode(half))]) == (1.0, 1.0)

    # twice as high and wide: each pixel of the true mask becomes four, edges move by less than one of them
    large = replace(_exact(samples[1], mask.repeat(2, 0).repeat(2, 1)), height=64, width=64)
    giou, _ = measured(taught, root, [large])
    assert giou is not None
    assert 0.8 < giou <= 1.0


def _exact(sample: Sample, mask: Mask) -> Sample:
    """The sample with `mask` as its one target."""
    return replace(sample, targets=(replace(sample.targets[0], rle=encode(mask)),))


def test_two_empty_masks_agree(taught: Segmenter, data: tuple[Path, list[Sample]]) -> None:
    root, samples = data
    every = np.ones((32, 32), dtype=bool)
    empty = replace(samples[1], ignore=encode(every))
    assert measured(taught, root, [empty]) == (1.0, None)
    (mask,) = drawn(taught, root, samples[1])
    giou, ciou = measured(taught, root, [empty, _exact(samples[1], ~mask)])
    assert (giou, ciou) == (0.5, 0.0)


def test_overlaps_are_kept(tmp_path: Path) -> None:
    found = [(3, 4), (0, 0)]
    write_overlaps(tmp_path / "batch", found)
    assert read_overlaps(tmp_path / "batch") == found
