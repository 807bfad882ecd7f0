"""RLE and polygons against arithmetic by hand, pycocotools and Pillow's rasteriser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from popen import masks
from popen.data.records import RecordError, run_lengths, to_rle

any_mask = st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(lambda size: arrays(bool, size))
two_masks = st.tuples(st.integers(1, 16), st.integers(1, 16)).flatmap(
    lambda size: st.tuples(arrays(bool, size), arrays(bool, size))
)


@given(any_mask)
def test_a_box_is_the_smallest_around_the_pixels(mask: masks.Mask) -> None:
    rows, columns = np.nonzero(mask)
    smallest = [0, 0, 0, 0]
    if mask.any():
        smallest = [int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
    assert masks.box(masks.encode(mask)) == smallest


def runs_by_hand(mask: masks.Mask) -> list[int]:
    """COCO's order: column by column, starting with the zeros."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if bool(pixel) != value:
            runs.append(0)
            value = not value
        runs[-1] += 1
    return runs


@given(any_mask)
def test_round_trip_and_area(mask: masks.Mask) -> None:
    rle = masks.encode(mask)
    assert rle["size"] == list(mask.shape)
    assert (masks.decode(rle) == mask).all()
    assert masks.area(rle) == mask.sum()


@given(any_mask)
def test_run_lengths_are_those_counted_by_hand(mask: masks.Mask) -> None:
    assert run_lengths(masks.encode(mask)["counts"]) == runs_by_hand(mask)


@given(any_mask)
def test_compressed_and_uncompressed_rle_are_the_same_mask(mask: masks.Mask) -> None:
    height, width = mask.shape
    rle = masks.encode(mask)
    assert to_rle({"size": [height, width], "counts": runs_by_hand(mask)}, height, width) == rle
    assert to_rle(dict(rle), height, width) == rle


def test_run_lengths_of_a_large_image() -> None:
    mask = np.zeros((1500, 2000), dtype=bool)
    mask[3:1490, 17:1999] = True
    assert run_lengths(masks.encode(mask)["counts"]) == runs_by_hand(mask)


@given(st.text(alphabet=st.characters(max_codepoint=200), max_size=12))
def test_no_string_gets_past_the_check_and_into_pycocotools_damaged(counts: str) -> None:
    try:
        rle = to_rle({"size": [5, 7], "counts": counts}, 5, 7)
    except RecordError:
        return
    assert masks.decode(rle).shape == (5, 7)
    assert sum(run_lengths(counts)) == 35


@given(two_masks)
def test_iou_is_that_of_pycocotools(pair: tuple[masks.Mask, masks.Mask]) -> None:
    a, b = pair
    rles = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in pair]
    if a.any() or b.any():
        assert masks.iou(a, b) == pytest.approx(coco.iou(rles[:1], rles[1:], [0])[0, 0])
    else:
        assert masks.iou(a, b) == 1.0


def test_iou_by_hand() -> None:
    a, b = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    a[:2], b[1:3] = True, True  # 8 pixels each, 4 in common
    assert masks.iou(a, b) == 4 / 12
    assert (masks.union([a, b], 4, 4) == (a | b)).all()
    assert not masks.union([], 4, 4).any()


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_rectangle_on_whole_pixels_is_exact(x: int, y: int, w: int, h: int) -> None:
    rle = masks.from_polygons([[x, y, x + w, y, x + w, y + h, x, y + h]], 24, 24)
    expected = np.zeros((24, 24), dtype=bool)
    expected[y : y + h, x : x + w] = True
    assert (masks.decode(rle) == expected).all()


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_star_polygons_are_pillows_up_to_the_edge(seed: int, corners: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(8, 30, corners)
    points = np.stack([32 + radii * np.cos(angles), 32 + radii * np.sin(angles)], axis=1)
    ours = masks.decode(to_rle([points.ravel().tolist()], 64, 64))
    canvas, edge = Image.new("1", (64, 64)), Image.new("1", (64, 64))
    corners_list = [(float(x), float(y)) for x, y in points]
    ImageDraw.Draw(canvas).polygon(corners_list, fill=1)
    ImageDraw.Draw(edge).line([*corners_list, corners_list[0]], fill=1, width=4)
    for x, y in corners_list:  # lines have no caps
        ImageDraw.Draw(edge).ellipse([x - 3, y - 3, x + 3, y + 3], fill=1)
    assert not ((ours != np.array(canvas)) & ~np.array(edge)).any()


def test_polygons_of_one_object_are_united() -> None:
    rle = to_rle([[0, 0, 4, 0, 4, 4, 0, 4], [6, 6, 8, 6, 8, 8, 6, 8]], 10, 10)
    assert masks.area(rle) == 16 + 4


@pytest.mark.parametrize(
    ("segmentation", "rule"),
    [
        ([], "neither RLE nor a list of polygons"),
        ("abc", "neither RLE nor a list of polygons"),
        ([[0, 0, 4, 4]], "three or more points"),
        ([[0, 0, 4, 0, 4, 4, 0, 4], [1, 2, 3]], "three or more points"),
        ([[0, 0, 4, 0, "4", 4]], "x, y pairs"),
        ([[0, 0, 12.5, 0, 4, 4]], "leaves the image"),
        ([[0, 0, 4, 0, 4, 10.5]], "leaves the image"),
        ([[-3, 0, 4, 0, 4, 4]], "leaves the image"),
        ([[float("nan"), 0, 4, 0, 4, 4]], "leaves the image"),
        ({"counts": [90]}, "'size' is missing"),
        ({"size": [10, 9], "counts": [90]}, r"size \[10, 9\] is not the image's \[9, 10\]"),
        ({"size": [9, 10], "counts": [80]}, "do not add up to 9 x 10"),
        ({"size": [9, 10], "counts": [100, -10]}, "do not add up"),
        ({"size": [9, 10], "counts": [89.5, 0.5]}, "neither a string nor a list of whole numbers"),
        ({"size": [9, 10], "counts": ""}, "damaged"),
        ({"size": [9, 10], "counts": "Z"}, "damaged|add up"),
        ({"size": [9, 10], "counts": "!!"}, "damaged"),
        ({"size": [9, 10], "counts": "ooooooooooo0"}, "damaged"),
    ],
)
def test_segmentations_that_are_refused(segmentation: object, rule: str) -> None:
    with pytest.raises(RecordError, match=rule):
        to_rle(segmentation, 9, 10)
