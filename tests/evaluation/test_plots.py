"""Figures show the numbers they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from popen.evaluation import plots


def rows(seed: int, bias: float) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    matched = np.clip(generator.random(60) + bias, 0, 1)
    return pd.DataFrame(
        {"uid": range(60), "matched": matched, "iou": matched, "area_pred": 11, "area_true": 10}
        | {"mentioned": 2, "hallucinated": generator.integers(0, 2, 60)}
    )


@pytest.fixture
def table() -> dict[str, dict[str, pd.DataFrame]]:
    return {
        b: {"control": rows(n, 0.0), "popen": rows(n, 0.1)} for n, b in enumerate(["muse_val", "refcoco+"])
    }


def test_bars_are_as_high_as_the_metric(table: dict[str, dict[str, pd.DataFrame]]) -> None:
    figure = plots.bars(table, ("gIoU_matched", "chair_s"), 50, 0)
    first = figure.axes[0]
    heights = [patch.get_height() for patch in first.patches if isinstance(patch, Rectangle)]
    wanted = [100 * table[b][s]["matched"].mean() for s in ("control", "popen") for b in table]
    assert heights == pytest.approx(wanted)
    assert [label.get_text() for label in first.get_xticklabels()] == ["muse_val", "refcoco+"]


def test_histograms_hold_every_question(table: dict[str, dict[str, pd.DataFrame]]) -> None:
    figure = plots.iou_histograms(table)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["muse_val", "refcoco+"]
    for patch in figure.axes[0].patches:
        assert patch.get_data().values.sum() == pytest.approx(100)  # type: ignore[attr-defined]


def test_area_ratio_and_ensemble(table: dict[str, dict[str, pd.DataFrame]]) -> None:
    line = plots.area_ratio(table).axes[0].lines[0]
    assert list(np.asarray(line.get_xdata())) == pytest.approx([1.1, 1.1])
    points = [
        {"members": 4, "mode": "mean", "seconds": 0.4, "gIoU_matched": 0.7, "chair_s": 0.1},
        {"members": 1, "mode": "mean", "seconds": 0.1, "gIoU_matched": 0.6, "chair_s": 0.2},
        {"members": 4, "mode": "best", "seconds": 0.3, "gIoU_matched": 0.5, "chair_s": 0.3},
        {"members": 8, "mode": "best", "seconds": 0.6, "gIoU_matched": 0.6, "chair_s": None},  # nothing said
    ]
    axes = plots.ensemble(points).axes
    assert [list(np.asarray(axis.lines[0].get_ydata())) for axis in axes] == [[60, 70], [20, 10], [0.1, 0.4]]
    drawn = [list(np.asarray(axis.lines[1].get_ydata())) for axis in axes]
    assert drawn == [[50, 60], [30], [0.3, 0.6]]


def test_curves_draw_a_line_a_stage() -> None:
    frame = pd.DataFrame({"step": [2, 1, 1], "name": ["loss", "loss", "lr"], "value": [0.5, 1.0, 0.1]})
    figure = plots.curves({"sft": frame, "control": frame[:2]}, ["loss", "lr"])
    loss, lr = figure.axes
    assert [list(np.asarray(line.get_ydata())) for line in loss.lines] == [[1.0, 0.5]] * 2
    assert [line.get_label() for line in lr.lines] == ["sft"]


def test_same_figure_same_bytes(tmp_path: Path, table: dict[str, dict[str, pd.DataFrame]]) -> None:
    for name in ("a", "b"):
        plots.save(plots.area_ratio(table), tmp_path / "plots" / f"{name}.png")
    one, two = ((tmp_path / "plots" / f"{name}.png") for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    assert np.ptp(np.asarray(Image.open(one))) > 100
