"""Overlap against arithmetic by hand, brute force and pycocotools."""

from __future__ import annotations

import contextlib
import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from popen.evaluation import iou
from popen.masks import Mask, encode


def box(left: int, top: int, width: int, height: int, size: int = 20) -> Mask:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def random_box(generator: np.random.Generator) -> Mask:
    left, top = generator.integers(0, 12, 2).tolist()
    width, height = generator.integers(4, 8, 2).tolist()
    return box(left, top, width, height)


matrices = st.tuples(st.integers(0, 4), st.integers(0, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(0, 1, width=16))
)


@given(matrices)
def test_matching_is_the_best_of_all_assignments(ious: np.ndarray) -> None:
    small = ious if ious.shape[0] <= ious.shape[1] else ious.T
    best = max(
        sum(small[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(small.shape[1]), small.shape[0])
    )
    pairs = iou.match(ious)
    assert sum(ious[pair] for pair in pairs) == pytest.approx(best)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == min(ious.shape)


def test_matched_value_divides_by_the_larger_number() -> None:
    ious = np.array([[0.5, 0.9], [0.1, 0.8], [0.0, 0.0]])  # best: 0.5 + 0.8 over three predictions
    assert iou.matched_value(ious) == pytest.approx(1.3 / 3)
    assert iou.matched_value(ious.T) == pytest.approx(1.3 / 3)  # one target missed
    assert iou.matched_value(np.zeros((2, 0))) == 0.0
    assert iou.matched_value(np.zeros((0, 0))) == 1.0


def test_greedy_would_be_worse_than_hungarian() -> None:
    ious = np.array([[0.6, 0.5], [0.55, 0.0]])  # greedy: 0.6 + 0.0; best: 0.5 + 0.55
    assert iou.matched_value(ious) == pytest.approx(1.05 / 2)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_iou_matrix_is_pycocotools(seed: int) -> None:
    generator = np.random.default_rng(seed)
    predicted = list(generator.random((3, 9, 7)) < 0.4)
    true = list(generator.random((2, 9, 7)) < 0.6)
    rles = [
        [{"size": rle["size"], "counts": rle["counts"].encode()} for rle in map(encode, masks)]
        for masks in (predicted, true)
    ]
    wanted = coco_mask.iou(rles[0], rles[1], [0, 0])
    np.testing.assert_allclose(iou.iou_matrix(predicted, true), wanted, atol=1e-12)


def test_ignored_pixels_count_on_neither_side() -> None:
    a, b, ignore = box(0, 0, 4, 2), box(2, 0, 4, 2), box(4, 0, 10, 10)
    predicted, true = iou.without([a], ignore), iou.without([b], ignore)
    assert (
        iou.iou_matrix(predicted, true)[0, 0] == 4 / 8
    )  # the 4 ignored pixels of b are gone: 4 / (8 + 4 - 4)
    assert iou.without([a], None)[0] is a


def test_two_empty_masks_overlap_fully() -> None:
    nothing = box(0, 0, 0, 0)
    assert iou.iou_matrix([nothing], [nothing, box(0, 0, 1, 1)]).tolist() == [[1.0, 0.0]]


def test_a_hit_takes_the_best_free_target() -> None:
    ious = np.array([[0.6, 0.9], [0.2, 0.8], [0.7, 0.0], [0.9, 0.9]])
    assert iou.hits(ious) == [True, False, True, False]
    assert iou.hits(np.zeros((2, 0))) == [False, False]
    assert iou.hits(np.array([[0.5]])) == [True]  # the threshold itself counts


def test_greedy_pairs_by_hand() -> None:
    """The largest first, though 0.8 + 0.7 would be more than 0.9 + 0.0 together."""
    assert iou.greedy_mean(np.array([[0.9, 0.8], [0.7, 0.0]])) == 0.9
    assert iou.greedy_mean(np.array([[0.9, 0.8], [0.7, 0.1]])) == pytest.approx((0.9 + 0.1) / 2)
    for nothing in (np.zeros((2, 3)), np.zeros((0, 3)), np.zeros((2, 0))):
        assert iou.greedy_mean(nothing) == 0.0


def test_average_precision_by_hand() -> None:
    # ranked: hit, miss, hit of 4 targets: precision 1 up to recall 1/4 (26 of 101 points), 2/3 up to
    # recall 1/2 (25 more), then nothing.
    ranked = np.array([True, False, True])
    assert iou.average_precision(ranked, 4) == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert np.isnan(iou.average_precision(ranked, 0))


def test_ap50_is_cocoeval() -> None:
    """Twelve images of boxes and shifted boxes, extra detections and ties of confidence between images."""
    generator = np.random.default_rng(3)
    images: list[dict[str, object]] = []
    truths: list[dict[str, object]] = []
    detections: list[dict[str, object]] = []
    positives: list[bool] = []
    confidences: list[float] = []
    targets = 0
    for image in range(1, 13):
        images.append({"id": image, "height": 20, "width": 20})
        true = [random_box(generator) for _ in range(image % 4)]
        predicted = [np.roll(mask, generator.integers(0, 3, 2), (0, 1)) for mask in true]
        predicted += [random_box(generator) for _ in range(image % 2)]
        confidence = float(generator.integers(1, 6)) / 5
        for mask in true:
            truths.append(
                {"id": len(truths) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
                | {"area": int(mask.sum()), "bbox": [0, 0, 1, 1], "segmentation": encode(mask)}
            )
        for mask in predicted:
            detections.append(
                {"image_id": image, "category_id": 1, "score": confidence, "segmentation": encode(mask)}
            )
        positives += iou.hits(iou.iou_matrix(predicted, true))
        confidences += [confidence] * len(predicted)
        targets += len(true)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": truths, "categories": [{"id": 1, "name": "thing"}]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    surest_first = np.argsort(-np.array(confidences), kind="stable")  # equals in their order
    ours = iou.average_precision(np.array(positives)[surest_first], targets)
    assert 0.1 < ours < 0.9
    assert ours == pytest.approx(float(evaluation.stats[1]), abs=1e-9)
