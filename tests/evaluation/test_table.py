"""The summary and the Markdown table."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from popen.evaluation.benchmark import summarise
from popen.evaluation.table import compare_all, results, summary


def rows(matched: float, hallucinated: int, benchmark: str = "muse", questions: int = 40) -> pd.DataFrame:
    spread = np.linspace(-0.1, 0.1, questions)
    return pd.DataFrame(
        {
            "uid": [f"q{n:03d}" for n in range(questions)],
            "benchmark": benchmark,
            "kind": "",
            "answer": "a cup",
        }
        | {"reference": "a cup", "iou": matched + spread, "matched": matched + spread, "intersection": 5}
        | {"union": 10, "mentioned": 2, "hallucinated": [hallucinated * (n % 2) for n in range(questions)]}
        | {"missing": 0, "targets": 1, "area_pred": 9, "area_true": 10, "greedy": 0.5, "pairs_iou": 0.5}
        | {"recalled": 1, "hits": "1", "n_pred": 1, "n_true": 1}
    )


@pytest.fixture
def table() -> dict[str, dict[str, pd.DataFrame]]:
    systems = {"sft": rows(0.5, 1), "control": rows(0.55, 1), "chosen": rows(0.6, 0), "popen": rows(0.65, 0)}
    return {"muse_val": systems, "refcoco+": {"control": rows(0.3, 0), "popen": rows(0.2, 1)}}


def test_summary_has_the_agreed_form(table: dict[str, dict[str, pd.DataFrame]]) -> None:
    figures = {name: {s: summarise(r) for s, r in by.items()} for name, by in table.items()}
    compared = compare_all(table, 100, 0)
    out = json.loads(json.dumps(summary(figures, compared), allow_nan=False))
    assert set(out) == {"muse_val", "refcoco+", "comparisons"}
    assert set(out["muse_val"]["popen"]) == {
        *("gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing", "area_ratio", "questions")
    }
    assert out["muse_val"]["popen"]["gIoU_matched"] == pytest.approx(0.65)
    pairs = {(row["benchmark"], row["system"], row["control"]) for row in out["comparisons"]}
    assert pairs == {
        ("muse_val", "sft", "control"),
        ("muse_val", "chosen", "control"),
        ("muse_val", "popen", "control"),
        ("muse_val", "popen", "chosen"),
        ("refcoco+", "popen", "control"),
    }
    (found,) = (
        row
        for row in out["comparisons"]
        if (row["benchmark"], row["metric"], row["control"]) == ("muse_val", "gIoU_matched", "chosen")
    )
    assert found["difference"] == found["low"] == found["high"] == pytest.approx(0.05)


def test_undefined_metrics_are_null_and_not_compared() -> None:
    table = {"reasonseg": {s: rows(0.5, 0).assign(mentioned=0) for s in ("control", "popen")}}
    out = summary(
        {"reasonseg": {s: summarise(r) for s, r in table["reasonseg"].items()}}, compare_all(table, 50, 0)
    )
    assert out["reasonseg"]["popen"]["chair_i"] is None
    assert {row["metric"] for row in out["comparisons"]} == {"gIoU", "cIoU", "gIoU_matched", "missing"}


def test_table_marks_clear_differences_only_and_knows_which_way_is_better(
    table: dict[str, dict[str, pd.DataFrame]],
) -> None:
    figures = {name: {s: summarise(r) for s, r in by.items()} for name, by in table.items()}
    text = results(figures, compare_all(table, 200, 0), 200)
    (popen,) = (line for line in text.splitlines() if line.startswith("| muse_val | popen | 65.0"))
    assert "65.0<br><sub>+10.0 [10.0, 10.0] ▲</sub>" in popen
    assert popen.count("50.0<br><sub>+0.0 [0.0, 0.0]</sub>") == 1  # cIoU is the same: no mark
    assert "0.0<br><sub>-50.0 [" in popen  # CHAIR_s falls
    assert popen.count("▲") == 4
    assert popen.endswith("| 0.90 | 40 |")
    (worse,) = (line for line in text.splitlines() if line.startswith("| refcoco+ | popen |"))
    assert worse.count("▼") == 4
    assert "| muse_val | popen − chosen |" in text
    assert "GranD_f" not in text


def test_grandf_gets_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = summarise(rows(0.5, 0, "grandf").assign(greedy=0.25, recalled=[0, 1] * 20))
    as_kept = json.loads(json.dumps(found, sort_keys=True))  # the order of a figure's name says nothing
    text = results({"grandf": {"popen": as_kept}}, {}, 10)
    assert "| benchmark | system | mIoU | AP50 | recall | CIDEr | METEOR |" in text
    assert "| grandf | popen | 25.0 | 100.0 | 50.0 | 0.0 | – |" in text
    assert summary({"grandf": {"popen": as_kept}}, {})["grandf"]["popen"]["grandf/recall"] == 0.5
    assert "Nothing to compare." in text
