import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popen.data.scenes.drawing import SUPER, Light, cut_out, draw_table, paint, visible, whole
from popen.data.scenes.geometry import box, ellipse, moved, polygon, ring, stroke
from popen.data.scenes.kinds import COLOURS, KINDS
from popen.data.scenes.noise import coarse
from popen.data.scenes.polygons import outlines
from popen.data.scenes.shapes import Part
from popen.masks import decode, from_polygons, iou

LIGHT = Light(-0.4, -0.5, 0.77, 0.4, 8.0)


def area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def test_outlines_have_the_areas_of_their_formulas() -> None:
    assert area(ellipse(0.1, 0.2, 0.5, 0.3)) == pytest.approx(np.pi * 0.15, rel=0.01)
    assert area(ring(0, 0, 0.5, 0.5, 0.2)) == pytest.approx(np.pi * (0.25 - 0.09), rel=0.01)
    assert area(stroke([(0, 0), (0, 0.5), (0, 1)], 0.2)) == pytest.approx(0.2)
    assert area(box(0, 0, 1, 1, corner=0.2)) == pytest.approx(1 - (4 - np.pi) * 0.04, rel=0.01)


def test_a_point_turns_clockwise_on_a_screen() -> None:
    right = polygon((1.0, 0.0))
    assert moved(right, 2, 90, 5, 5)[0] == pytest.approx((5.0, 7.0))  # y points down


def square() -> list[Part]:
    return [Part(box(-0.5, -0.5, 0.5, 0.5), (200.0, 30.0, 30.0), 0.5)]


def test_what_lies_on_top_hides_what_is_below() -> None:
    below = cut_out(square(), 32, 8, 0, 12, 12)
    above = cut_out(square(), 32, 8, 0, 16, 12)
    masks = visible([below, above], 32)
    assert np.count_nonzero(whole(below, 32)) == pytest.approx(64, abs=9)
    assert np.count_nonzero(masks[0]) == pytest.approx(32, abs=9)
    assert np.array_equal(masks[1], whole(above, 32))
    assert not (masks[0] & masks[1]).any()


def test_a_mark_never_widens_the_silhouette() -> None:
    wide = Part(box(-2, -0.1, 2, 0.1), (0.0, 0.0, 0.0), 0, mark=True)
    plain, marked = (cut_out(parts, 32, 8, 0, 16, 16) for parts in (square(), [*square(), wide]))
    assert np.array_equal(plain.silhouette, marked.silhouette)


def test_a_thing_is_painted_where_its_mask_is() -> None:
    table = draw_table(np.random.default_rng(0), (62, 70, 102), "cloth", 32 * SUPER)
    cutout = cut_out(square(), 32, 10, 0, 16, 16)
    picture = np.asarray(paint(table, [cutout], LIGHT)).astype(int)
    red = picture[..., 0] - picture[..., 2] > 20
    assert iou(red, whole(cutout, 32)) > 0.85


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_fits_its_length_and_is_thick_enough(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = KINDS[kind].shape(rng, COLOURS[KINDS[kind].colours[0]])
    cutout = cut_out(parts, 64, 25, 0, 32, 32)
    rows, columns = np.nonzero(whole(cutout, 64))
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 20 <= extent <= 29
    assert len(rows) / extent >= 2.8  # mean thickness in pixels


def test_outlines_of_a_cup_keep_the_hole_of_its_handle() -> None:
    parts = KINDS["cup"].shape(np.random.default_rng(0), COLOURS["red"])
    mask = whole(cut_out(parts, 64, 40, 0, 32, 32), 64)
    polygons = outlines(mask)
    assert len(polygons) == 1
    assert iou(decode(from_polygons([polygons[0].ravel().tolist()], 64, 64)), mask) > 0.97


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(2, 20)] * 4), min_size=1, max_size=4))
def test_outlines_give_the_mask_back(boxes: list[tuple[int, int, int, int]]) -> None:
    mask = np.zeros((48, 48), dtype=bool)
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] ^= True
    if mask.any():
        rle = from_polygons([outline.ravel().tolist() for outline in outlines(mask)], 48, 48)
        assert iou(decode(rle), mask) > 0.9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(0, 50))
def test_a_coarse_mask_is_near_its_mask_and_never_empty(seed: int, thick: int, place: int) -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[place : place + 14, 20 : 20 + thick] = True
    spoiled = coarse(mask, np.random.default_rng(seed))
    assert spoiled.any()
    near = np.zeros_like(mask)
    near[max(0, place - 3) : place + 17, 17 : 23 + thick] = True
    assert not (spoiled & ~near).any()
