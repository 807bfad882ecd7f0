"""The report's words: summary figures, comparisons and the Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame

from popen.evaluation.benchmark import GRANDF, LOWER_IS_BETTER, METRICS
from popen.evaluation.bootstrap import Comparison, compare
from popen.evaluation.peers import PEERS

Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]  # benchmark -> system -> figures
Compared = dict[tuple[str, str, str, str], Comparison]  # (benchmark, metric, system, control)

PAIRS = (
    ("sft", "control"),
    ("chosen", "control"),
    ("popen", "control"),
    ("popen+ensemble", "control"),
    ("popen", "chosen"),
    ("popen+ensemble", "chosen"),
    ("popen+ensemble", "popen"),
)
OWN = (*PEERS, *GRANDF)  # figures that some benchmarks have beside METRICS
COMPARED = ("gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing")
_HEADS = {
    "gIoU": "gIoU",
    "cIoU": "cIoU",
    "gIoU_matched": "matched gIoU",
    "chair_i": "CHAIR_i ↓",
    "chair_s": "CHAIR_s ↓",
    "missing": "missing ↓",
}


def compare_all(table: Mapping[str, Mapping[str, DataFrame]], resamples: int, seed: int) -> Compared:
    """Every pair of PAIRS that was evaluated, in every benchmark, by every metric of COMPARED."""
    return {
        (benchmark, metric, system, control): compare(rows[system], rows[control], metric, resamples, seed)
        for benchmark, rows in table.items()
        for system, control in PAIRS
        if system in rows and control in rows
        for metric in COMPARED
    }


def summary(figures: Summary, compared: Compared) -> dict[str, Any]:
    """Contents of `metrics/summary.json`: figures by benchmark and system, and the comparisons."""
    keys = (*METRICS, "questions")
    out: dict[str, Any] = {
        benchmark: {
            system: {key: values[key] for key in (*keys, *(key for key in OWN if key in values))}
            for system, values in by_system.items()
        }
        for benchmark, by_system in figures.items()
    }
    out["comparisons"] = [
        {"benchmark": benchmark, "metric": metric, "system": system, "control": control}
        | {"difference": found.difference, "low": found.low, "high": found.high}
        for (benchmark, metric, system, control), found in compared.items()
        if not math.isnan(found.difference)  # the benchmark does not define the metric
    ]
    return out


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _change(found: Comparison, metric: str) -> str:
    """ "+2.3 [1.1, 3.4] ▲": percentage points, interval, and whether it is clearly better or worse."""
    if math.isnan(found.difference):
        return ""
    better = (found.difference < 0) == (metric in LOWER_IS_BETTER)
    mark = (" ▲" if better else " ▼") if found.clear else ""
    return f"{100 * found.difference:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]{mark}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = [head, ["---", "---", *["--:"] * (len(head) - 2)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in text) + "\n"


def _main(figures: Summary, compared: Compared) -> str:
    lines = []
    for benchmark, by_system in figures.items():
        for system, values in by_system.items():
            cells = []
            for metric in _HEADS:
                found = compared.get((benchmark, metric, system, "control"))
                change = _change(found, metric) if found else ""
                cells.append(_percent(values[metric]) + (f"<br><sub>{change}</sub>" if change else ""))
            ratio = "–" if values["area_ratio"] is None else f"{values['area_ratio']:.2f}"
            lines.append([benchmark, system, *cells, ratio, str(values["questions"])])
    return _markdown(["benchmark", "system", *_HEADS.values(), "area ratio", "questions"], lines)


def _pairs(compared: Compared) -> str:
    pairs = dict.fromkeys((b, s, c) for b, _, s, c in compared if c != "control")
    lines = [
        [b, f"{s} − {c}", *(_change(compared[b, metric, s, c], metric) or "–" for metric in _HEADS)]
        for b, s, c in pairs
    ]
    return _markdown(["benchmark", "systems", *_HEADS.values()], lines) if lines else "Nothing to compare.\n"


def _lines(figures: Summary, keys: Sequence[str]) -> list[list[str]]:
    """The figures named `keys`, of whatever has one of them."""
    return [
        [benchmark, system, *(_percent(values.get(key)) for key in keys)]
        for benchmark, by_system in figures.items()
        for system, values in by_system.items()
        if any(values.get(key) is not None for key in keys)
    ]


def _grandf(figures: Summary) -> str:
    lines = _lines(figures, GRANDF)
    if not lines:
        return ""
    head = [key.removeprefix("grandf/") for key in GRANDF]
    return "\n## GranD_f's own figures\n\n" + _markdown(["benchmark", "system", *head], lines)


def _peers(figures: Summary) -> str:
    lines = _lines(figures, PEERS)
    if not lines:
        return ""
    head = ["teacher-forced gIoU", "teacher-forced cIoU", "per-target gIoU", "per-target cIoU"]
    return f"""
## As the peers measure

To be put beside published tables only, never beside the figures above. Teacher-forced: the true answer is
fed, so that no target can be missed and none be too many (LISA and PixelLM, for RefCOCO and ReasonSeg); the
ensemble, which chooses among answers, has none. Per target: free-running, but every target and not every
question counts (PixelLM, for MUSE).

{_markdown(["benchmark", "system", *head], lines)}"""


def results(figures: Summary, compared: Compared, resamples: int) -> str:
    """The report in Markdown. `figures` as `benchmark.summarise` gives them."""
    return f"""# Results

Figures in percent, free-running: the model's own words decide which targets exist. Below a figure stands
its difference to `control` (the SFT model trained further on the SFT corpus for the same steps) in
percentage points, with the 95 % interval of a paired bootstrap over questions ({resamples:,} resamples);
▲ clearly better, ▼ clearly worse, no mark: the interval includes zero. ↓ lower is better. `chosen` is the
SFT model trained by cross-entropy and mask loss on the winners of the same preference data. The area
ratio is predicted over true area: an "improvement" that is only a larger mask shows there.

{_main(figures, compared)}
## Against each other

{_pairs(compared)}{_grandf(figures)}{_peers(figures)}"""
