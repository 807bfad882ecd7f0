"""The paired bootstrap against a naive loop, its coverage and its identities."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pandas import DataFrame

from popen.evaluation.benchmark import METRICS
from popen.evaluation.bootstrap import compare, interval
from popen.evaluation.prediction import EvaluationError


def rows(questions: int, seed: int) -> DataFrame:
    generator = np.random.default_rng(seed)
    union = generator.integers(1, 400, questions)
    intersection = (union * generator.random(questions)).astype(int)
    mentioned = generator.integers(0, 5, questions)
    return DataFrame(
        {
            "uid": [f"q{number:04d}" for number in range(questions)],
            "intersection": intersection,
            "union": union,
            "iou": intersection / union,
            "matched": generator.random(questions),
            "mentioned": mentioned,
            "hallucinated": np.minimum(mentioned, generator.integers(0, 2, questions)),
            "missing": generator.integers(0, 2, questions),
            "targets": generator.integers(1, 4, questions),
            "area_pred": union,
            "area_true": union + 3,
        }
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_rows_differ_by_nothing(metric: str) -> None:
    table = rows(40, 0)
    found = compare(table, table, metric, 200, 1)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.clear


@pytest.mark.parametrize("metric", METRICS)
def test_matches_a_naive_loop(metric: str) -> None:
    a, b = rows(30, 1), rows(30, 2)
    found = compare(a, b, metric, 400, 5)
    draws = np.random.default_rng(5)
    naive = []
    for size in (200, 200):  # the draws come in chunks of 200
        for picked in draws.integers(30, size=(size, 30)):
            naive.append(METRICS[metric](a.iloc[picked]) - METRICS[metric](b.iloc[picked]))
    assert found.difference == pytest.approx(METRICS[metric](a) - METRICS[metric](b))
    assert [found.low, found.high] == pytest.approx(list(np.percentile(naive, [2.5, 97.5])))


def test_pairs_by_question_not_by_position() -> None:
    a, b = rows(50, 3), rows(50, 4)
    shuffled = b.sample(frac=1.0, random_state=0)
    assert compare(a, shuffled, "gIoU", 100, 0) == compare(a, b, "gIoU", 100, 0)


def test_a_shift_of_every_question_has_no_uncertainty() -> None:
    a = rows(50, 5)
    found = compare(a.assign(matched=a["matched"] + 0.1), a, "gIoU_matched", 100, 0)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    assert found.clear


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    """300 data sets whose true difference is 0.05: about 95 % of the intervals hold it."""
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(300):
        base = generator.random(80)
        a = DataFrame({"uid": range(80), "matched": base + generator.normal(0.05, 0.2, 80)})
        b = DataFrame({"uid": range(80), "matched": base})
        found = compare(a, b, "gIoU_matched", 300, seed)
        covered += found.low <= 0.05 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_of_one_system_holds_its_value_and_narrows() -> None:
    few, many = rows(50, 8), rows(800, 8)
    low, high = interval(few, "cIoU", 400, 0)
    assert low < METRICS["cIoU"](few) < high
    narrow_low, narrow_high = interval(many, "cIoU", 400, 0)
    assert narrow_high - narrow_low < (high - low) / 2


def test_undefined_metric_gives_nan() -> None:
    table = rows(10, 0).assign(mentioned=0, hallucinated=0)
    found = compare(table, table, "chair_i", 50, 0)
    assert np.isnan([found.difference, found.low, found.high]).all()
    assert not found.clear


def test_refuses_other_questions() -> None:
    table = rows(10, 0)
    with pytest.raises(EvaluationError, match="same questions"):
        compare(table, table.iloc[1:], "gIoU", 10, 0)


def test_two_thousand_resamples_of_six_hundred_questions_are_quick() -> None:
    a, b = rows(600, 1), rows(600, 2)
    began = time.process_time()
    compare(a, b, "gIoU", 2000, 0)
    assert time.process_time() - began < 1.0
