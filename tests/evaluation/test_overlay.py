"""Pictures: what is coloured where, and how an answer is taken apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from popen.evaluation.overlay import PAPER, beside, caption, colour, overlay, paint, pieces, stack
from popen.samples import SEG

from .conftest import box

GREY = Image.new("RGB", (64, 48), (128, 128, 128))


def mask(left: int, top: int, width: int, height: int) -> np.ndarray:
    return box(left, top, width, height, 64)[:48]


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        ("It is the cup {seg} and the fork {seg}.", ["the cup", "the fork"]),
        ("I can see the man at the top left {seg}.", ["the man at the top left"]),
        ("Here, red cup {seg}, blue cup {seg}", ["red cup", "blue cup"]),
        ("{seg}", []),
        ("A dog {seg} {seg} runs.", ["A dog"]),
    ],
)
def test_phrases_of_an_answer(answer: str, phrases: list[str]) -> None:
    assert [words for words, index in pieces(answer) if index is not None] == phrases


@given(st.text(alphabet="the cup and, .", max_size=30), st.text(max_size=10), st.text(max_size=10))
def test_pieces_keep_every_word(first: str, second: str, third: str) -> None:
    answer = f"{first}{SEG}{second}{SEG}{third}"
    kept = "".join(words for words, _ in pieces(answer))
    assert kept.split() == answer.replace(SEG, " ").split() or "".join(kept.split()) == "".join(
        answer.replace(SEG, "").split()
    )


def test_colours_are_distinct() -> None:
    assert len({colour(index) for index in range(40)}) == 40


def test_masks_are_tinted_in_their_colours_and_the_rest_is_not() -> None:
    painted = np.asarray(paint(GREY, [mask(4, 4, 20, 20), mask(36, 20, 20, 20)], 320)).astype(int)
    assert painted.shape == (240, 320, 3)
    for index, (x, y) in enumerate(((14, 14), (46, 30))):
        tint = painted[y * 5, x * 5] - 128
        wanted = np.array(colour(index)) - 128
        assert np.corrcoef(tint, wanted)[0, 1] > 0.99
    corner = painted[-3, 3]
    assert np.ptp(corner) <= 1  # grey stays grey
    border = painted[14 * 5, 4 * 5 - 2 : 4 * 5 + 4]  # across the left border of the first mask
    assert np.abs(border - colour(0)).max(axis=1).min() < 30
    assert border.min(axis=1).max() > 200  # a white line goes around it


def test_without_masks_the_picture_is_only_enlarged() -> None:
    assert np.asarray(paint(GREY, [], 128)).tolist() == np.full((96, 128, 3), 128).tolist()


def test_an_answer_is_written_in_the_colours_of_its_masks() -> None:
    picture = overlay(GREY, [mask(4, 4, 20, 20)], "It is the cup {seg}.", "What is it?", size=320)
    assert picture.width == 320
    assert picture.height > 240
    below = np.asarray(picture)[-20:].reshape(-1, 3).astype(int)
    assert (np.abs(below - colour(0)).max(axis=1) < 40).any()
    assert (np.abs(below - colour(1)).max(axis=1) >= 40).all()


def test_long_texts_wrap() -> None:
    runs = [("word " * 60, (0, 0, 0), False), ("x" * 200, (0, 0, 0), True)]
    narrow, wide = caption(runs, 200), caption(runs, 600)
    assert narrow.width == 200
    assert narrow.height > 2 * wide.height
    edge = np.asarray(narrow)[:, -4:]
    assert (edge == PAPER).all()  # nothing runs over the border


def test_same_inputs_same_pixels() -> None:
    one, two = (overlay(GREY, [mask(4, 4, 20, 20)], "the cup {seg}") for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_stack_and_beside_sizes() -> None:
    a, b = Image.new("RGB", (10, 5)), Image.new("RGB", (20, 7))
    assert stack([a, b], gap=2).size == (20, 14)
    assert beside([a, b], gap=3).size == (39, 13)


def test_refuses_masks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="names 1 targets but there are 0 masks"):
        overlay(GREY, [], "the cup {seg}")
    with pytest.raises(ValueError, match=r"mask of \(8, 8\) over an image of \(48, 64\)"):
        overlay(GREY, [box(0, 0, 2, 2)], "the cup {seg}")
