"""Which examples are shown, and that the page is safe and complete."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pandas as pd
from PIL import Image

from popen.evaluation.page import Example, Panel, choose, page, showpieces

from .conftest import box


def rows(matched: list[float], hallucinated: list[int], missing: list[int]) -> pd.DataFrame:
    count = len(matched)
    return pd.DataFrame(
        {"uid": [f"q{n}" for n in range(count)], "kind": [f"k{n % 2}" for n in range(count)], "n_true": 2}
        | {"matched": matched, "hallucinated": hallucinated, "missing": missing}
    )


def test_extremes_are_chosen_and_none_twice() -> None:
    before = rows([0.9, 0.1, 0.9, 0.5, 0.5, 0.2], [0] * 6, [0] * 6)
    after = rows([0.9, 0.8, 0.3, 0.4, 0.5, 0.1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0])
    chosen = choose(before, after, 1)
    assert chosen == {
        "Best: several targets": ["q0"],
        "Gained most": ["q1"],
        "Lost most": ["q2"],
        "Hallucinated": ["q3"],
        "Missed targets": ["q4"],
        "Worst overlap": ["q5"],
    }
    assert choose(before.iloc[::-1], after.sample(frac=1, random_state=1), 1) == chosen


def test_headings_without_questions_are_left_out() -> None:
    perfect = rows([1.0, 1.0], [0, 0], [0, 0])
    assert list(choose(perfect, perfect, 1)) == ["Best: several targets", "Worst overlap"]


def test_showpieces_are_flawless_and_differ_in_image_and_kind() -> None:
    table = rows([0.99, 0.9, 0.8, 0.7, 1.0, 0.6], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1])
    images = {"q0": "a", "q1": "b", "q2": "a", "q3": "c", "q4": "d", "q5": "e"}
    assert showpieces(table, images, 2) == ["q0", "q1"]
    assert showpieces(table, images, 4) == ["q0", "q1", "q3"]
    assert showpieces(table.assign(hallucinated=1), images, 4) == []


def test_everything_is_escaped_and_embedded() -> None:
    evil = '<script>alert("x")</script>'
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    panel = Panel(evil, (box(1, 1, 4, 4),), f"the {evil} {{seg}} & more", evil)
    html = page(evil, evil, {evil: [Example(evil, evil, image, (panel, panel))]})
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 9
    assert "&amp; more" in html
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 2
    for source in sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
        assert picture.size == (288, 288)
        assert np.ptp(np.asarray(picture)) > 50  # the mask is painted
    assert "http" not in html
