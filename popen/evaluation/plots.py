"""Figures of the report. Each function takes numbers and returns a matplotlib Figure; `save` writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from popen.evaluation.benchmark import LOWER_IS_BETTER, METRICS
from popen.evaluation.bootstrap import interval

Table = Mapping[str, Mapping[str, DataFrame]]  # benchmark -> system -> rows

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa2ad",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "xtick.color": "#4a5058",
    "ytick.color": "#4a5058",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_COLOURS = ("#b3bac4", "#69707d", "#f0a52b", "#d9363e", "#6b3fa0", "#1d7ad6", "#14965a", "#a0622d")
LABELS = {
    "gIoU": "gIoU",
    "cIoU": "cIoU",
    "gIoU_matched": "matched gIoU",
    "chair_i": "CHAIR_i",
    "chair_s": "CHAIR_s",
    "missing": "missing targets",
    "area_ratio": "predicted / true area",
}


def title(metric: str) -> str:
    """A metric's name and which way is better."""
    return f"{LABELS[metric]} ({'lower' if metric in LOWER_IS_BETTER else 'higher'} is better)"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that holds no date and no version: the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _grid(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes in rows of `columns`, each `width` x `height` inches."""
    columns = min(columns, panels)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))


def bars(table: Table, metrics: Sequence[str], resamples: int, seed: int) -> Figure:
    """One panel a metric: a bar a system in each benchmark, in percent, with 95 % bootstrap intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(metrics), 1, max(6.0, 1.3 * len(table) + 1.5), 2.3)
        for axis, metric in zip(axes, metrics, strict=True):
            systems = list(dict.fromkeys(system for rows in table.values() for system in rows))
            step = 0.8 / len(systems)
            for number, system in enumerate(systems):
                values, errors = [], []
                for rows in table.values():
                    value = METRICS[metric](rows[system])
                    low, high = interval(rows[system], metric, resamples, seed)
                    values.append(100 * value)
                    errors.append((100 * max(0.0, value - low), 100 * max(0.0, high - value)))
                axis.bar(
                    np.arange(len(table)) + (number - (len(systems) - 1) / 2) * step,
                    values,
                    0.92 * step,
                    yerr=np.array(errors).T,
                    label=system,
                    color=_COLOURS[number % len(_COLOURS)],
                    error_kw={"elinewidth": 0.9, "ecolor": "#2b2f36", "capsize": 1.5},
                )
            axis.set_title(title(metric), loc="left")
            axis.set_ylabel("%")
            axis.set_ylim(bottom=0.0)
            axis.set_xticks(np.arange(len(table)), list(table))
            axis.grid(axis="x", visible=False)
        _legend(figure, axes[0])
    return figure


def iou_histograms(table: Table) -> Figure:
    """Share of questions by matched IoU, a panel a benchmark, an outline a system."""
    edges = np.linspace(0.0, 1.0, 11)
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(table), 3, 3.2, 2.3)
        for axis, (benchmark, by_system) in zip(axes, table.items(), strict=True):
            for number, (system, rows) in enumerate(by_system.items()):
                counts, _ = np.histogram(rows["matched"], edges)
                shares = 100 * counts / len(rows)
                axis.stairs(
                    shares, edges, label=system, color=_COLOURS[number % len(_COLOURS)], linewidth=1.6
                )
            axis.set_title(benchmark, loc="left")
            axis.set_xlabel("matched IoU of a question")
            axis.set_ylabel("questions, %")
        _legend(figure, axes[0])
    return figure


def area_ratio(table: Table) -> Figure:
    """Predicted over true area, a line a benchmark, a dot a system: is a gain only a larger mask?"""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _grid(1, 1, 6.5, 0.45 * len(table) + 1.2)
        systems = list(dict.fromkeys(system for rows in table.values() for system in rows))
        for number, system in enumerate(systems):
            values = [METRICS["area_ratio"](rows[system]) for rows in table.values()]
            axis.plot(
                values,
                np.arange(len(table)),
                "o",
                markersize=7,
                label=system,
                color=_COLOURS[number % len(_COLOURS)],
                markeredgecolor="white",
            )
        axis.axvline(1.0, color="#2b2f36", linewidth=1.0)
        axis.set_yticks(np.arange(len(table)), list(table))
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.set_xlabel("predicted area / true area (1: neither too large nor too small)")
        _legend(figure, axis)
    return figure


def curves(series: Mapping[str, DataFrame], names: Sequence[str]) -> Figure:
    """Training curves: a panel a name, a line a stage. Frames have the columns step, name, value."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(names), 3, 3.4, 2.3)
        for axis, name in zip(axes, names, strict=True):
            for number, (stage, frame) in enumerate(series.items()):
                part = frame[frame["name"] == name].sort_values("step")
                if len(part):
                    axis.plot(
                        part["step"],
                        part["value"],
                        label=stage,
                        color=f"C{number}",
                        marker="o" if len(part) < 12 else None,
                        markersize=3,
                    )
            axis.set_title(name, loc="left")
            axis.set_xlabel("step")
            axis.legend(fontsize=7)
    return figure


def ensemble(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Quality, hallucination and time of a question against the number of members, a line a mode.

    Points have the keys members, mode, seconds, gIoU_matched and chair_s; None is left out.
    """
    panels = (
        ("gIoU_matched", title("gIoU_matched"), 100.0, "%"),
        ("chair_s", title("chair_s"), 100.0, "%"),
        ("seconds", "time of a question", 1.0, "seconds"),
    )
    ordered = sorted(points, key=lambda point: point["members"])
    sizes = sorted({point["members"] for point in points})
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(3, 3, 3.2, 2.4)
        for axis, (key, name, factor, unit) in zip(axes, panels, strict=True):
            for number, mode in enumerate(dict.fromkeys(point["mode"] for point in points)):
                line = [
                    (point["members"], factor * point[key])
                    for point in ordered
                    if point["mode"] == mode and point[key] is not None
                ]
                axis.plot([x for x, _ in line], [y for _, y in line], "o-", label=mode, color=f"C{number}")
            axis.set_title(name, loc="left")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel("members")
            axis.set_ylabel(unit)
        _legend(figure, axes[0])
    return figure
