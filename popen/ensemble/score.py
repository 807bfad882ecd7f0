"""The preference score: which of the M members of a question to trust.

The implicit reward of DPO alone is a poor guide to a member's quality (measured, ours), so the score is
fitted on held-out questions. Of the two candidates, a Bradley-Terry model of ranked pairs and a regression on
quality, we take the regression: the member chosen by an estimate of expected quality has the best expected
quality, sizes of differences count (a Bradley-Terry fit weighs a pair that differs by a hair like one that
differs by a whole object, and drops ties, which sampled answers are full of), and the solution has a closed
form. The score is ours; POPEN does not say, as far as we know, how its preference score is calibrated.

Shapes: Q questions, M members, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from popen.evaluation.iou import matched_value

Array = NDArray[np.float64]

FEATURES = ("logp", "confidence", "agreement")
"""What a member is scored by: mean log-likelihood of its answer's tokens under the policy; mean
`mask_confidence` of its targets; mean `agreement` of its masks with the other members' (ours: the choice of
least Bayes risk, as in machine translation, with the metric of the benchmark)."""

REWARD = ("reward",)  # the implicit reward, log pi - log pi_ref of the answer; needs the reference model


def agreement(members: Sequence[Tensor]) -> list[float]:
    """Boolean masks (n, H, W) of each of M members -> each member's mean value (summed IoU of the matched
    masks / the larger number of masks) against the M - 1 others; 1 for a member alone."""
    values = np.eye(len(members))
    for one, other in combinations(range(len(members)), 2):
        a, b = members[one].flatten(1).float(), members[other].flatten(1).float()
        joint = a @ b.T
        union = a.sum(1)[:, None] + b.sum(1) - joint
        ious = torch.where(union > 0, joint / union.clamp(min=1), 1.0)
        values[one, other] = values[other, one] = matched_value(ious.double().cpu().numpy())
    others = ~np.eye(len(members), dtype=bool)
    return values.mean(1, where=others).tolist() if len(members) > 1 else [1.0]


@dataclass(frozen=True)
class Score:
    """A linear score: sum over F of weight * (feature - mean) / scale. Only differences between the members
    of a question mean something; for a fitted score they are predicted differences of quality."""

    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]

    def __call__(self, features: Array) -> Array:
        """(..., F), the columns `self.features` names -> scores (...), here (Q, M, F) -> (Q, M)."""
        return (features - np.array(self.mean)) / np.array(self.scale) @ np.array(self.weight)

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists, for JSON."""
        return {name: list(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, record: dict[str, list[Any]]) -> Score:
        """Inverse of `to_dict`."""
        return cls(**{name: tuple(values) for name, values in record.items()})


def reward_score() -> Score:
    """The implicit reward alone (parameter `ensemble.score: reward`)."""
    return Score(REWARD, (0.0,), (1.0,), (1.0,))


def fit(features: Array, quality: Array, ridge: float = 1e-2) -> Score:
    """Ridge regression of quality on standardised features, both centred within each question.

    Centring takes out how hard a question is, which no choice between its members can change.

    Args:
        features: (Q, M, 3), the FEATURES of each member.
        quality: (Q, M), what the score shall predict: the question's value (sum of matched IoU /
            max(predicted, true), so both hallucinations and omissions lower it).
        ridge: penalty, as a part of a standardised feature's variance.

    Raises:
        ValueError: shapes that do not fit, or a value that is not finite (an answer without masks has
            confidence 0, not none).
    """
    if quality.ndim != 2 or features.shape != (*quality.shape, len(FEATURES)) or not quality.size:
        raise ValueError(
            f"features {features.shape} must be (Q, M, {len(FEATURES)}) and quality {quality.shape} (Q, M), "
            "with at least one question and member"
        )
    for name, values in [*zip(FEATURES, np.moveaxis(features, -1, 0), strict=True), ("quality", quality)]:
        for question, member in np.argwhere(~np.isfinite(values)):
            raise ValueError(f"question {question}, member {member}: {name} is {values[question, member]}")
    mean = features.mean((0, 1))
    x = (features - features.mean(1, keepdims=True)).reshape(-1, len(FEATURES))
    y = (quality - quality.mean(1, keepdims=True)).ravel()
    scale = x.std(0)
    scale = np.where(scale > 1e-9 * (1.0 + np.abs(mean)), scale, 1.0)  # one that never varies weighs nothing
    # the penalty as further rows of a least-squares problem: normal equations would square the condition
    rows = np.vstack([x / scale, np.sqrt(ridge * len(x)) * np.eye(len(FEATURES))])
    weight = np.linalg.lstsq(rows, np.append(y, np.zeros(len(FEATURES))), rcond=None)[0]
    return Score(FEATURES, tuple(mean.tolist()), tuple(scale.tolist()), tuple(weight.tolist()))


def correlation(scores: Array, quality: Array) -> float:
    """Pearson correlation of (Q, M) scores and quality, centred within each question; 0 where either never
    varies within a question."""
    x, y = (values - values.mean(1, keepdims=True) for values in (scores, quality))
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0
