"""Every column and every metric against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest

from popen.evaluation.benchmark import METRICS, rows, summarise
from popen.evaluation.prediction import EvaluationError, Prediction
from popen.masks import encode
from popen.samples import Sample

from .conftest import box

Ask = Callable[..., Sample]
Say = Callable[..., Prediction]


@pytest.fixture
def table(ask: Ask, say: Say) -> pd.DataFrame:
    samples = [
        # 1: both found, in the other order; one cup half covered
        ask("muse/val/0", [("cup", (0, 0, 4, 2)), ("fork", (4, 4, 2, 2))], ["cup", "fork"], kind="use"),
        # 2: one target of two missed, a spoon hallucinated with a mask of 4 pixels
        ask("muse/val/1", [("cup", (0, 0, 2, 2)), ("fork", (4, 4, 2, 2))], ["cup", "fork"], kind="use"),
        # 3: nothing answered
        ask("muse/val/2", [("spoon", (0, 0, 2, 2))], ["spoon"], kind="place"),
    ]
    predictions = [
        say("muse/val/2", "I cannot tell."),
        say("muse/val/0", "The fork {seg} and the cup {seg}.", (4, 4, 2, 2), (0, 0, 2, 2)),
        say("muse/val/1", "The cup {seg} and the spoon {seg}.", (0, 0, 2, 2), (6, 0, 2, 2)),
    ]
    return rows(samples, predictions)


def test_rows_by_hand(table: pd.DataFrame) -> None:
    wanted = {
        "uid": ["muse/val/0", "muse/val/1", "muse/val/2"],
        "n_true": [2, 2, 1],
        "n_pred": [2, 2, 0],
        "intersection": [8, 4, 0],
        "union": [12, 12, 4],
        "iou": [8 / 12, 4 / 12, 0.0],
        "matched": [(0.5 + 1.0) / 2, (1.0 + 0.0) / 2, 0.0],
        "mentioned": [2, 2, 0],
        "hallucinated": [0, 1, 0],
        "missing": [0, 1, 1],
        "targets": [2, 2, 1],
        "area_pred": [8, 8, 0],
        "area_true": [12, 8, 4],
        "greedy": [(0.5 + 1.0) / 2, 1.0, 0.0],  # of the pairs that overlap
        "recalled": [2, 1, 0],
        "hits": ["11", "10", ""],
    }
    for column, values in wanted.items():
        assert list(table[column]) == values, column


def test_metrics_by_hand(table: pd.DataFrame) -> None:
    wanted = {
        "gIoU": (8 / 12 + 4 / 12) / 3,
        "cIoU": 12 / 28,
        "gIoU_matched": 1.25 / 3,
        "chair_i": 1 / 4,
        "chair_s": 1 / 2,  # of the answers that mention any
        "missing": 2 / 5,
        "area_ratio": 16 / 24,
    }
    assert wanted.keys() == METRICS.keys()
    for name, value in wanted.items():
        assert METRICS[name](table) == pytest.approx(value), name


def test_summary_by_kind(table: pd.DataFrame) -> None:
    summary = summarise(table)
    assert summary["questions"] == 3
    assert summary["kinds"]["use"]["questions"] == 2
    assert summary["kinds"]["use"]["gIoU"] == pytest.approx(0.5)
    assert summary["kinds"]["place"]["chair_s"] is None  # nothing mentioned there
    assert "grandf" not in summary


def test_ignored_pixels_leave_every_count(ask: Ask, say: Say) -> None:
    sample = ask("reasonseg/val/0", [("", (0, 0, 4, 4))], [], ignore=encode(box(2, 0, 6, 8)))
    (row,) = rows([sample], [say("reasonseg/val/0", "This {seg}", (0, 0, 8, 2))]).to_dict("records")
    assert (row["intersection"], row["union"], row["area_pred"], row["area_true"]) == (4, 8, 4, 8)
    assert row["matched"] == row["iou"] == 0.5
    assert (row["mentioned"], row["targets"]) == (0, 0)


def test_a_union_of_answers_against_one_target(ask: Ask, say: Say) -> None:
    """RefCOCO style: two masks that make up the target together are right as a union, not as a match."""
    sample = ask("refcoco/val/0", [("cup", (0, 0, 4, 2))], ["cup"])
    answer = say("refcoco/val/0", "The cup {seg} {seg}", (0, 0, 2, 2), (2, 0, 2, 2))
    (row,) = rows([sample], [answer]).to_dict("records")
    assert row["iou"] == 1.0
    assert row["matched"] == 0.5 / 2


def test_nothing_asked_and_nothing_answered_is_right(ask: Ask, say: Say) -> None:
    sample = ask("muse/val/0", [], ["cup"], answer="There is no fork.")
    (row,) = rows([sample], [say("muse/val/0", "There is no fork.")]).to_dict("records")
    assert (row["iou"], row["matched"], row["hallucinated"], row["missing"]) == (1.0, 1.0, 0, 0)


def test_the_truth_as_answer_is_perfect(ask: Ask) -> None:
    samples = [
        ask("refcoco/val/0", [("cup", (0, 0, 3, 3)), ("dog", (4, 4, 3, 3))], ["cup", "dog"]),
        ask("muse/val/1", [("cat", (1, 1, 3, 3))], ["cat"], answer="One black cat {seg} sits on grass."),
    ]
    answers = [Prediction(s.uid, s.answer, tuple(t.rle for t in s.targets), 0.0, 1.0, 0.0) for s in samples]
    summary = summarise(rows(samples, answers))
    assert [summary[name] for name in METRICS] == [1, 1, 1, 0, 0, 0, 1]


def test_grandf_figures_by_hand(ask: Ask, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no Java: METEOR is left out
    samples = [
        ask("grandf/val/0", [("cup", (0, 0, 4, 2)), ("dog", (4, 4, 2, 2))], ["cup", "dog"]),
        ask("grandf/val/1", [("cat", (0, 0, 2, 2))], ["cat"]),
    ]
    answers = [
        say("grandf/val/0", "the cup {seg}", (0, 0, 3, 2), confidence=0.2),  # which is not looked at
        say("grandf/val/1", "a bird {seg} and cat {seg}", (4, 4, 2, 2), (0, 0, 2, 2), confidence=0.9),
    ]
    figures = summarise(rows(samples, answers))
    assert figures["grandf/mIoU"] == pytest.approx((0.75 + 1.0) / 2)
    assert figures["grandf/recall"] == pytest.approx(2 / 3)
    # in their order hit, miss, hit of three targets: precision 1 to a third, then 2/3
    assert figures["grandf/AP50"] == pytest.approx((34 + 33 * (2 / 3)) / 101)
    assert 0 < figures["grandf/CIDEr"] < 10
    assert figures["grandf/METEOR"] is None


def test_refuses_what_does_not_fit(ask: Ask, say: Say) -> None:
    a, b = (ask(f"muse/val/{n}", [("cup", (0, 0, 2, 2))], ["cup"]) for n in (0, 1))
    right = [say(sample.uid, "The cup {seg}", (0, 0, 2, 2)) for sample in (a, b)]
    with pytest.raises(EvaluationError, match=r"1 questions have no prediction \['muse/val/1'\]"):
        rows([a, b], right[:1])
    with pytest.raises(EvaluationError, match=r"1 predictions answer no question \['muse/val/1'\]"):
        rows([a], right)
    with pytest.raises(EvaluationError, match="twice"):
        rows([a, b], [*right, right[0]])
    small = replace(right[0], masks=(encode(box(0, 0, 2, 2, size=4)),))
    with pytest.raises(EvaluationError, match=r"muse/val/0: predicted mask of size \[4, 4\]"):
        rows([a], [small])
