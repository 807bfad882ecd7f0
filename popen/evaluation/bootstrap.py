"""Paired bootstrap over questions (Efron): does a difference outlast another draw of questions?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame

from popen.evaluation.benchmark import METRICS, RATIOS
from popen.evaluation.prediction import EvaluationError

Floats = NDArray[np.float64]
_CHUNK = 200  # resamples at once: bounds the memory to _CHUNK x questions


@dataclass(frozen=True)
class Comparison:
    """metric(a) - metric(b) with its 95 % percentile interval; NaN where the metric is undefined."""

    difference: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """The interval excludes zero."""
        return self.low > 0.0 or self.high < 0.0


def resample(columns: Floats, resamples: int, seed: int) -> Floats:
    """Sums of columns (questions, k) over bootstrap resamples of the questions: (resamples, k)."""
    questions = len(columns)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        drawn = generator.integers(questions, size=(size, questions))
        drawn += np.arange(size)[:, None] * questions
        weights = np.bincount(drawn.ravel(), minlength=size * questions).reshape(size, questions)
        sums[start : start + size] = weights @ columns
    return sums


def _interval(values: Floats) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: nothing counted, the interval is NaN too
        low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _columns(rows: DataFrame, metric: str) -> Floats:
    over, under = RATIOS[metric]
    return np.stack([over(rows), under(rows)], axis=1)


def _quotient(over: Floats, under: Floats) -> Floats:
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under != 0)


def interval(rows: DataFrame, metric: str, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of one system's metric (a name of METRICS)."""
    sums = resample(_columns(rows, metric), resamples, seed)
    return _interval(_quotient(sums[:, 0], sums[:, 1]))


def compare(rows_a: DataFrame, rows_b: DataFrame, metric: str, resamples: int, seed: int) -> Comparison:
    """Paired comparison of two systems on the same questions.

    Both take the same draws of questions, and the same seed gives the same draws for every metric.
    Raises EvaluationError when the two do not answer the same questions.
    """
    if set(rows_a["uid"]) != set(rows_b["uid"]) or len(rows_a) != len(rows_b) or not len(rows_a):
        raise EvaluationError("two systems can be compared on the same questions only; evaluate both again")
    a, b = (table.sort_values("uid") for table in (rows_a, rows_b))
    sums = resample(np.concatenate([_columns(a, metric), _columns(b, metric)], axis=1), resamples, seed)
    differences = _quotient(sums[:, 0], sums[:, 1]) - _quotient(sums[:, 2], sums[:, 3])
    found = METRICS[metric](a) - METRICS[metric](b), *_interval(differences)
    return Comparison(*(round(value, 12) for value in found))  # no rounding error may pass for a difference
