"""The gate: may a challenger become the champion? Decided on per-question rows of both, nothing else.

Ours: of a metric under `gain` the whole paired interval must lie above the smallest gain, so chance alone
seldom promotes; of a metric under `tolerated` the loss as measured may not exceed its limit (an interval's
worst end would refuse nearly everything at a few hundred questions). Whatever cannot be told (NaN, a metric
that was not measured, other questions) refuses.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from pandas import DataFrame

from popen.evaluation.benchmark import LOWER_IS_BETTER, METRICS
from popen.evaluation.bootstrap import compare
from popen.evaluation.prediction import EvaluationError
from popen.params import GateParams


class GateError(ValueError):
    """The gate's parameters do not fit the project; the message names the key and the remedy."""


@dataclass(frozen=True)
class Check:
    """One rule. Fractions; `gain` is above zero where the challenger is better, also where lower is better.

    What is not known is None: the champion's side of a first model, a metric that was not measured.
    """

    metric: str
    passed: bool
    words: str  # the reason, with its figures
    champion: float | None = None
    challenger: float | None = None
    gain: float | None = None
    low: float | None = None  # 95 % interval of the gain
    high: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The gate's decision with all of its reasons."""

    passed: bool
    lead: str  # on what it was decided
    checks: tuple[Check, ...] = ()

    @property
    def words(self) -> str:
        """Markdown: the decision in a line, and a line a check, those that decided against first."""
        checks = sorted(self.checks, key=lambda check: check.passed)
        lines = [f"- {'kept' if check.passed else 'BROKEN'}: {check.words}" for check in checks]
        return "\n".join([f"{'Passed' if self.passed else 'Refused'}: {self.lead}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON (no NaN in it)."""
        return {"passed": self.passed, "lead": self.lead, "checks": [asdict(check) for check in self.checks]}


def judge(
    champion: DataFrame | None, challenger: DataFrame, gate: GateParams, resamples: int, seed: int
) -> Verdict:
    """Decide on the rows (`popen.evaluation.benchmark.rows`) of champion and challenger.

    `champion` is None where there is none yet: then it is enough that every metric named is finite.
    """
    where = f"{gate.system} on {len(challenger)} questions of {gate.benchmark}"
    if champion is None:
        firsts = tuple(_finite(challenger, name) for name in dict.fromkeys((*gate.gain, *gate.tolerated)))
        return Verdict(
            all(check.passed for check in firsts), f"{where}, the first model, no champion yet", firsts
        )
    checks = (
        *(_gained(champion, challenger, name, least, resamples, seed) for name, least in gate.gain.items()),
        *(
            _tolerated(champion, challenger, name, most, resamples, seed)
            for name, most in gate.tolerated.items()
        ),
    )
    return Verdict(all(check.passed for check in checks), f"{where}, champion on the same", checks)


def _finite(rows: DataFrame, name: str) -> Check:
    value = _measured(rows, name)
    if value is None:
        return Check(name, False, f"{name}: the challenger has no finite value")
    return Check(name, True, f"{name}: {value:.4f}", challenger=value)


def _gained(a: DataFrame, b: DataFrame, name: str, least: float, resamples: int, seed: int) -> Check:
    found = _compared(a, b, name, resamples, seed)
    if found.gain is None or found.low is None:
        return found
    passed = found.low > least
    return _said(found, passed, f"the interval must lie above {least:+.4f}")


def _tolerated(a: DataFrame, b: DataFrame, name: str, most: float, resamples: int, seed: int) -> Check:
    found = _compared(a, b, name, resamples, seed)
    if found.gain is None or found.low is None:
        return found
    return _said(found, found.gain >= -most, f"a loss of {most:.4f} is tolerated")


def _said(found: Check, passed: bool, rule: str) -> Check:
    words = (
        f"{found.metric}: {found.champion:.4f} -> {found.challenger:.4f}, gain {found.gain:+.4f} "
        f"[{found.low:+.4f}, {found.high:+.4f}]; {rule}"
    )
    return replace(found, passed=passed, words=words)


def _compared(champion: DataFrame, challenger: DataFrame, name: str, resamples: int, seed: int) -> Check:
    """The gain and its interval, not judged yet; without a gain where it cannot be told, and why."""
    before, after = _measured(champion, name), _measured(challenger, name)
    for who, value in (("challenger", after), ("champion", before)):
        if value is None:
            return Check(name, False, f"{name}: the {who} has no finite value", before, after)
    try:
        found = compare(challenger, champion, name, resamples, seed)
    except EvaluationError as error:
        return Check(name, False, f"{name}: {error}", before, after)
    gain, low, high = found.difference, found.low, found.high
    if name in LOWER_IS_BETTER:
        gain, low, high = 0.0 - gain, 0.0 - high, 0.0 - low  # no minus zero
    if not all(map(math.isfinite, (gain, low, high))):
        return Check(name, False, f"{name}: the interval of the gain is not finite", before, after)
    return Check(name, False, "", before, after, gain, low, high)


def _measured(rows: DataFrame, name: str) -> float | None:
    """A metric of rows; None where it is not finite or its columns are not there."""
    try:
        value = METRICS[name](rows)
    except KeyError:
        return None
    return value if math.isfinite(value) else None
