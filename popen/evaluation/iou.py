"""Overlap of predicted and true masks: unions, Hungarian matching, AP50 (design: free-running metrics).

Masks are boolean arrays (H, W). Pixels of `ignore` are removed from both sides before anything is
counted; two empty masks overlap fully (IoU 1), as in LISA's and PixelLM's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from popen.masks import Mask, iou

Matrix = NDArray[np.float64]


def without(masks: Sequence[Mask], ignore: Mask | None) -> list[Mask]:
    """The masks with the ignored pixels cleared."""
    return list(masks) if ignore is None else [mask & ~ignore for mask in masks]


def iou_matrix(predicted: Sequence[Mask], true: Sequence[Mask]) -> Matrix:
    """IoU of every pair, (P, N)."""
    out = np.zeros((len(predicted), len(true)))
    for row, a in enumerate(predicted):
        for column, b in enumerate(true):
            out[row, column] = iou(a, b)
    return out


def match(ious: Matrix) -> list[tuple[int, int]]:
    """Pairs (predicted, true), min(P, N) of them, whose summed IoU is largest (Hungarian method)."""
    rows, columns = linear_sum_assignment(ious, maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def matched_value(ious: Matrix) -> float:
    """A question's value: summed IoU of the matched pairs / max(P, N); 1 when nothing is asked or given.

    Every target missed and every mask too many counts as a zero.
    """
    larger = max(ious.shape)
    return 1.0 if larger == 0 else sum(float(ious[pair]) for pair in match(ious)) / larger


def greedy_mean(ious: Matrix) -> float:
    """GLaMM's mIoU of an image: the mean IoU of pairs (predicted, true), taken one by one, the largest first,
    while two overlap; 0 where none do."""
    left, taken = ious.copy(), list[float]()
    while left.size and left.max() > 0:
        row, column = np.unravel_index(left.argmax(), left.shape)
        taken.append(float(left[row, column]))
        left[row, :], left[:, column] = 0.0, 0.0
    return sum(taken) / max(1, len(taken))


def hits(ious: Matrix, threshold: float = 0.5) -> list[bool]:
    """Which detections are true positives, COCO's rule: in order, each takes its best target still free.

    `ious` (P, N) has its rows in order of falling confidence.
    """
    free = ious.copy()
    out = []
    for row in range(len(free)):
        best = int(free[row].argmax()) if free.shape[1] else -1
        hit = best >= 0 and free[row, best] >= threshold
        if hit:
            free[:, best] = -1.0
        out.append(bool(hit))
    return out


def average_precision(ranked: NDArray[np.bool_], targets: int) -> float:
    """COCO's 101-point interpolated average precision of one class.

    `ranked` (detections,): which are true positives, the surest first. NaN without targets.
    """
    if targets == 0:
        return float("nan")
    recall = np.cumsum(ranked) / targets
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    points = np.searchsorted(recall, np.linspace(0.0, 1.0, 101), side="left")
    return float(np.append(precision, 0.0)[points].mean())
