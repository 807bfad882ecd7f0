"""The gate on rows that are written down: better, equal, worse, and everything that cannot be told."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import numpy as np
import pytest
from pandas import DataFrame
from pydantic import ValidationError

from popen.evaluation.benchmark import RATIOS
from popen.params import GateParams, Metric
from popen.promotion.gate import Verdict, judge

GATE = GateParams(
    benchmark="muse_val",
    system="popen+ensemble",
    gain={"gIoU_matched": 0.0},
    tolerated={"gIoU": 0.01, "chair_s": 0.02, "missing": 0.02},
)


def rows(**columns: Any) -> DataFrame:
    """200 questions with the columns that the gate's metrics read."""
    quality = np.random.default_rng(0).uniform(0.2, 0.8, 200)
    table = DataFrame({"uid": [f"muse/val/{n}/0" for n in range(200)], "matched": quality, "iou": quality})
    counts = {"mentioned": 2, "hallucinated": 0, "missing": 0, "targets": 2}
    table = table.assign(**counts)
    table.loc[:19, "hallucinated"] = 1  # one answer in ten
    return table.assign(**columns)


def decide(champion: DataFrame | None, challenger: DataFrame, gate: GateParams = GATE) -> Verdict:
    return judge(champion, challenger, gate, resamples=500, seed=0)


def broken(verdict: Verdict) -> list[str]:
    return [check.metric for check in verdict.checks if not check.passed]


def test_better_passes_with_its_figures() -> None:
    before = rows()
    after = rows(matched=before["matched"] + 0.05)
    verdict = decide(before, after)
    assert verdict.passed
    first = verdict.checks[0]
    assert first.metric == "gIoU_matched"
    assert first.gain == pytest.approx(0.05)
    assert first.low == pytest.approx(0.05)  # every question gains the same
    assert f"{before['matched'].mean():.4f} -> {after['matched'].mean():.4f}, gain +0.0500" in verdict.words
    assert verdict.words.startswith("Passed: popen+ensemble on 200 questions of muse_val")
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["passed"] is True


def test_equal_and_worse_are_refused() -> None:
    before = rows()
    same = decide(before, before.copy())
    assert not same.passed
    assert broken(same) == ["gIoU_matched"]
    assert "gain +0.0000 [+0.0000, +0.0000]; the interval must lie above +0.0000" in same.words
    worse = decide(before, rows(matched=before["matched"] - 0.05))
    assert broken(worse) == ["gIoU_matched"]
    assert "gain -0.0500" in worse.words


def test_a_gain_that_chance_explains_is_refused() -> None:
    before = rows()
    noise = np.random.default_rng(1).normal(0.0, 0.2, 200)
    noise += 0.005 - noise.mean()
    verdict = decide(before, rows(matched=before["matched"] + noise))
    check = verdict.checks[0]
    assert check.gain == pytest.approx(0.005)
    assert check.low is not None
    assert check.low < 0
    assert not verdict.passed


@pytest.mark.parametrize(("least", "passed"), [(0.049, True), (0.05, False)])
def test_the_smallest_gain_must_be_exceeded(least: float, passed: bool) -> None:
    before = rows(matched=0.5)
    gate = GATE.model_copy(update={"gain": {"gIoU_matched": least}})
    assert decide(before, rows(matched=0.55), gate).passed is passed


@pytest.mark.parametrize(("more", "passed"), [(4, True), (5, False)])
def test_a_loss_is_tolerated_to_its_limit_also_where_lower_is_better(more: int, passed: bool) -> None:
    before = rows()
    after = rows(matched=before["matched"] + 0.05)
    after.loc[20 : 19 + more, "hallucinated"] = 1  # a question is 0.005 of chair_s, tolerated are 0.02
    verdict = decide(before, after)
    chair = next(check for check in verdict.checks if check.metric == "chair_s")
    assert chair.gain == pytest.approx(-0.005 * more)
    assert chair.gain is not None
    assert chair.low is not None
    assert chair.high is not None
    assert chair.low <= chair.gain <= chair.high <= 0
    assert verdict.passed is passed
    if not passed:
        assert verdict.words.splitlines()[1].startswith("- BROKEN: chair_s: 0.1000 -> 0.1250, gain -0.0250")


def test_fewer_hallucinations_are_a_gain() -> None:
    gate = GATE.model_copy(update={"gain": {"chair_s": 0.0}, "tolerated": {}})
    assert decide(rows(), rows(hallucinated=0), gate).passed
    assert not decide(rows(hallucinated=0), rows(), gate).passed


@pytest.mark.parametrize("who", ["champion", "challenger"])
def test_nan_and_a_missing_metric_are_refused(who: str) -> None:
    good = rows()
    better = good.assign(matched=good["matched"] + 0.05)
    first_nan = [math.nan, *better["matched"][1:]]
    for spoiled in (
        better.assign(matched=first_nan),
        better.drop(columns="matched"),
        better.assign(matched=math.inf),
    ):
        pair = (good, spoiled) if who == "challenger" else (spoiled, better)
        verdict = decide(*pair)
        assert broken(verdict) == ["gIoU_matched"]
        assert f"gIoU_matched: the {who} has no finite value" in verdict.words
        json.dumps(verdict.to_dict(), allow_nan=False)


def test_a_metric_that_counts_nothing_is_refused() -> None:
    good = rows()
    silent = good.assign(matched=good["matched"] + 0.05, mentioned=0, hallucinated=0)
    assert broken(decide(good, silent)) == ["chair_s"]


def test_other_questions_are_refused() -> None:
    good = rows()
    better = good.assign(matched=good["matched"] + 0.05)
    for other in (better[:-1], better.assign(uid=better["uid"] + "x"), better[:0]):
        verdict = decide(good, other)
        assert not verdict.passed
        assert "gIoU_matched" in broken(verdict)
    assert "can be compared on the same questions only" in decide(good, better[:-1]).words


def test_the_first_model_must_only_be_finite() -> None:
    verdict = decide(None, rows())
    assert verdict.passed
    assert "the first model, no champion yet" in verdict.words
    assert broken(decide(None, rows(iou=math.nan))) == ["gIoU"]
    assert broken(decide(None, rows().drop(columns="missing"))) == ["missing"]


def test_the_parameters_take_known_metrics_alone() -> None:
    assert set(get_args(Metric)) == set(RATIOS) - {"area_ratio"}  # of which no side is better
    plain = GATE.model_dump()
    changes: list[dict[str, Any]] = [{"gain": {}}, {"gain": {"area_ratio": 0.0}}, {"best": 1}]
    for change in (*changes, {"tolerated": {"gIoU": -0.1}}):
        with pytest.raises(ValidationError):
            GateParams.model_validate(plain | change)
