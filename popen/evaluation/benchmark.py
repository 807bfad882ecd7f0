"""A benchmark's figures: one row of counts a question, and metrics as ratios of sums over rows.

Because every metric is a ratio of two columns' sums, the bootstrap resamples rows and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame

from popen.evaluation import captions, iou
from popen.evaluation.hallucination import categories, judge
from popen.evaluation.prediction import EvaluationError, Prediction
from popen.masks import Mask, decode, union
from popen.model.words import Vocabulary
from popen.samples import Rle, Sample

Column = NDArray[np.float64]


def _masks(rles: Sequence[Rle], sample: Sample, what: str) -> list[Mask]:
    for rle in rles:
        if rle["size"] != [sample.height, sample.width]:
            raise EvaluationError(
                f"{sample.uid}: {what} of size {rle['size']} in an image of {[sample.height, sample.width]}; "
                "give masks at the image's size"
            )
    return [decode(rle) for rle in rles]


def row(sample: Sample, prediction: Prediction, vocabulary: Vocabulary) -> dict[str, Any]:
    """The counts of one question; areas, intersection and union in pixels of the image."""
    ignore = None if sample.ignore is None else _masks([sample.ignore], sample, "ignore region")[0]
    predicted = iou.without(_masks(prediction.masks, sample, "predicted mask"), ignore)
    true = iou.without(_masks([target.rle for target in sample.targets], sample, "target"), ignore)
    a, b = union(predicted, sample.height, sample.width), union(true, sample.height, sample.width)
    shared, joint = int(np.count_nonzero(a & b)), int(np.count_nonzero(a | b))
    ious = iou.iou_matrix(predicted, true)
    matched = iou.match(ious)
    pairs = [float(ious[pair]) for pair in matched]
    said = judge(sample, prediction.text, vocabulary)
    return {
        "uid": sample.uid,
        "benchmark": sample.benchmark,
        "kind": sample.kind,
        "n_true": len(true),
        "n_pred": len(predicted),
        "intersection": shared,
        "union": joint,
        "iou": shared / joint if joint else 1.0,
        "matched": iou.matched_value(ious),
        "mentioned": len(said.mentioned),
        "hallucinated": len(said.hallucinated),
        "missing": len(said.missing),
        "targets": said.targets,
        "area_pred": int(np.count_nonzero(a)),
        "area_true": int(np.count_nonzero(b)),
        "greedy": iou.greedy_mean(ious),
        "pairs_iou": sum(pairs),
        "pairs_intersection": sum(int(np.count_nonzero(predicted[i] & true[j])) for i, j in matched),
        "areas": sum(int(np.count_nonzero(mask)) for mask in (*predicted, *true)),
        "recalled": sum(pair >= 0.5 for pair in pairs),
        "hits": "".join("01"[hit] for hit in iou.hits(ious)),  # one a predicted mask, for AP50
        "answer": prediction.text,
        "reference": sample.answer,
    }


def rows(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> DataFrame:
    """One row a question, in the order of `samples`; columns as `row` names them.

    Raises EvaluationError when a prediction is missing, doubled or answers no question of `samples`, and when
    a mask is not at its image's size.
    """
    answers = {prediction.uid: prediction for prediction in predictions}
    asked = {sample.uid for sample in samples}
    if answers.keys() != asked:
        lost, extra = sorted(asked - answers.keys()), sorted(answers.keys() - asked)
        raise EvaluationError(
            f"{len(lost)} questions have no prediction {lost[:1]}, {len(extra)} predictions answer no "
            f"question {extra[:1]}; run the stage evaluate again"
        )
    if len(answers) != len(predictions) or len(asked) != len(samples):
        raise EvaluationError("a question occurs twice; give every question and its prediction once")
    vocabulary = Vocabulary(categories(samples))
    return DataFrame([row(sample, answers[sample.uid], vocabulary) for sample in samples])


def _ones(table: DataFrame) -> Column:
    return np.ones(len(table))


def _column(name: str) -> Callable[[DataFrame], Column]:
    return lambda table: table[name].to_numpy(dtype=np.float64)


def _any(name: str) -> Callable[[DataFrame], Column]:
    return lambda table: (table[name].to_numpy() > 0).astype(np.float64)


# metric -> (numerator, denominator), each a column (questions,) whose sums are divided
RATIOS: dict[str, tuple[Callable[[DataFrame], Column], Callable[[DataFrame], Column]]] = {
    "gIoU": (_column("iou"), _ones),
    "cIoU": (_column("intersection"), _column("union")),
    "gIoU_matched": (_column("matched"), _ones),
    "chair_i": (_column("hallucinated"), _column("mentioned")),
    "chair_s": (_any("hallucinated"), _any("mentioned")),
    "missing": (_column("missing"), _column("targets")),
    "area_ratio": (_column("area_pred"), _column("area_true")),
}
LOWER_IS_BETTER = frozenset({"chair_i", "chair_s", "missing"})


def _ratio(name: str) -> Callable[[DataFrame], float]:
    over, under = RATIOS[name]

    def metric(table: DataFrame) -> float:
        below = under(table).sum()
        return float(over(table).sum() / below) if below else math.nan

    return metric


METRICS: dict[str, Callable[[DataFrame], float]] = {name: _ratio(name) for name in RATIOS}
"""Metric of rows, as a fraction (0..1; area_ratio any); NaN where nothing is counted."""


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _figures(table: DataFrame) -> dict[str, float | int | None]:
    return {name: _defined(metric(table)) for name, metric in METRICS.items()} | {"questions": len(table)}


GRANDF = ("grandf/mIoU", "grandf/AP50", "grandf/recall", "grandf/CIDEr", "grandf/METEOR")


def grandf(table: DataFrame) -> dict[str, float | None]:
    """GRANDF, GranD_f's own figures as GLaMM's code has them (Rasheed et al. 2024, `eval/gcg/evaluate.py`).

    mIoU is a mean over images; in AP50 all detections are equally sure. Other than there, recall matches by
    the Hungarian method and asks IoU >= 0.5 of a pair, not that the phrases agree as well.
    """
    positives = np.array([hit == "1" for hit in "".join(table["hits"])], dtype=bool)
    answers, references = list(table["answer"]), list(table["reference"])
    targets = int(table["n_true"].sum())
    values = {
        "grandf/mIoU": float(table["greedy"].mean()),
        "grandf/AP50": iou.average_precision(positives, targets),
        "grandf/recall": int(table["recalled"].sum()) / targets if targets else math.nan,
        "grandf/CIDEr": captions.cider(answers, references),
        "grandf/METEOR": captions.meteor(answers, references),
    }
    return {name: _defined(value) for name, value in values.items()}


def summarise(table: DataFrame) -> dict[str, Any]:
    """Figures of rows: every metric and `questions`; `kinds` has the same for each kind of question where
    kinds are told; of GranD_f also GRANDF. Fractions; None where nothing is counted."""
    out: dict[str, Any] = _figures(table)
    named = table[table["kind"] != ""]
    if len(named):
        out["kinds"] = {str(kind): _figures(part) for kind, part in named.groupby("kind")}
    if set(table["benchmark"]) == {"grandf"}:
        out |= grandf(table)
    return out
