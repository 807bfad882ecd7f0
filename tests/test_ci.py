"""The check of the pipeline's metrics sees what is missing."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

_PATH = Path(__file__).parents[1] / ".ci" / "check_metrics.py"


def problems(summary: dict[str, Any]) -> list[str]:
    spec = importlib.util.spec_from_file_location("check_metrics", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.problems(summary, ["muse_val", "refcoco"], ["sft", "popen"])
    return found


@pytest.fixture
def summary() -> dict[str, Any]:
    names = ["gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing", "area_ratio", "questions"]
    rows = {
        name: {system: dict.fromkeys(names, 0.5) for system in ("sft", "popen")}
        for name in ("muse_val", "refcoco")
    }
    row = {"benchmark": "muse_val", "metric": "chair_s", "difference": -0.1, "low": -0.2, "high": 0.0}
    return {**rows, "comparisons": [row]}


def test_a_complete_summary_passes(summary: dict[str, Any]) -> None:
    assert problems(summary) == []
    for system in ("sft", "popen"):
        summary["refcoco"][system]["chair_s"] = None  # that benchmark names no other objects
    assert problems(summary) == []


def test_gaps_are_named(summary: dict[str, Any]) -> None:
    del summary["refcoco"]["popen"]
    summary["muse_val"]["sft"]["gIoU"] = math.nan
    del summary["muse_val"]["popen"]["missing"]
    summary["comparisons"][0]["high"] = math.inf
    assert problems(summary) == [
        "muse_val x sft: gIoU is nan",
        "muse_val x popen: missing is missing",
        "refcoco x popen: missing",
        "comparison muse_val chair_s: high not finite",
    ]
    assert "muse_val x sft: missing" in problems({"comparisons": [{}]})


def test_a_metric_that_is_null_everywhere_is_no_result(summary: dict[str, Any]) -> None:
    for benchmark in ("muse_val", "refcoco"):
        for system in ("sft", "popen"):
            summary[benchmark][system]["area_ratio"] = None
    assert problems(summary) == ["area_ratio: null in every benchmark"]
