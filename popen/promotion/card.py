"""The model card: what a model was made of, what it measured against the controls, where it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from popen.promotion.registry import Lineage

SHOWN = ("gIoU_matched", "gIoU", "cIoU", "chair_s", "missing")
CONTROLS = ("control", "chosen")
WORST = 3  # kinds of questions named as failures


def card(root: Path, facts: Lineage) -> str:
    """Markdown, from the figures in the clone `root`."""
    system = facts.params["gate"]["system"]
    return "\n".join(
        [
            "# POPEN: words and masks for questions about images",
            "",
            "Answers a question about an image with text and one mask for each thing the text names; aligned "
            "by preferences and answered by an ensemble (after POPEN, arXiv 2504.00640).",
            "",
            "## Data",
            "",
            f"DVC's hash {facts.data}, git commit {facts.commit}, dvc.lock {facts.lock}. Fitted on",
            *(f"- {role}: {', '.join(facts.params['data']['splits'][role])}" for role in _fitted(facts)),
            "",
            f"## Figures of {system} against the baseline and both controls",
            "",
            *_table(facts.figures, system),
            "",
            *_compared(root, system),
            "",
            "## Known failures",
            "",
            *_failures(root, facts, system),
            "- Words it never saw in training, scenes unlike the training data, and languages other than "
            "English are not measured. Not for decisions about people or safety.",
            "",
            "## Licence",
            "",
            "Code Apache-2.0. Weights trained on other data than the project's own drawn scenes are bound by "
            "the licences of that data and of the pretrained parts that params.yaml names.",
            "",
        ]
    )


def _fitted(facts: Lineage) -> list[str]:
    return [role for role in ("train", "preference", "val") if role in facts.params["data"]["splits"]]


def _table(figures: dict[str, Any], system: str) -> list[str]:
    """A row a benchmark and system: ours, the model before alignment, the two controls."""
    lines = [
        "| benchmark | system | " + " | ".join(SHOWN) + " | questions |",
        "|" + "---|" * (len(SHOWN) + 3),
    ]
    for benchmark, systems in figures.items():
        for name in ("sft", *CONTROLS, system):
            if name in systems:
                values = " | ".join(_percent(systems[name].get(metric)) for metric in SHOWN)
                lines.append(f"| {benchmark} | {name} | {values} | {systems[name]['questions']} |")
    return lines


def _compared(root: Path, system: str) -> list[str]:
    """The differences to the controls with their intervals, as the report measured them."""
    found = json.loads((root / "metrics/summary.json").read_text(encoding="utf-8")).get("comparisons", [])
    lines = [
        f"- {one['benchmark']}, {one['metric']}, {system} - {one['control']}: {100 * one['difference']:+.1f} "
        f"[{100 * one['low']:+.1f}, {100 * one['high']:+.1f}] points"
        for one in found
        if one["system"] == system and one["control"] in CONTROLS and one["metric"] in SHOWN
        if None not in (one["difference"], one["low"], one["high"])
    ]
    return lines or [f"No comparison of {system} with a control was measured."]


def _failures(root: Path, facts: Lineage, system: str) -> list[str]:
    gate = facts.params["gate"]["benchmark"]
    path = root / f"metrics/{gate}/{system}.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = [
        f"- {gate}: {_percent(measured.get(name))} % {words}"
        for name, words in (
            ("chair_s", "of the answers that name anything name something absent"),
            ("missing", "of the true targets are never named"),
        )
        if name in measured
    ]
    kinds = sorted(measured.get("kinds", {}).items(), key=lambda item: item[1]["gIoU_matched"] or 0.0)
    lines += [
        f"- {gate}: weak at questions of the kind {kind}, matched gIoU {_percent(values['gIoU_matched'])}"
        for kind, values in kinds[:WORST]
    ]
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
