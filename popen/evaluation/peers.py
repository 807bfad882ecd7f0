"""Figures as the published code of the peers measures them: for published tables, never beside ours.

`teacher_forced/...` is `validate` of LISA (Lai et al. 2024) and PixelLM (Ren et al. 2024), which stands
behind their figures for RefCOCO and ReasonSeg: the true answer is fed and every true target has its mask by
construction. `per_target/...` is `ar_validate` of PixelLM, for MUSE: the model's own answers, but every
target counts where ours let every question count.
"""

from __future__ import annotations

from pandas import DataFrame

TEACHER_FORCED = ("teacher_forced/gIoU", "teacher_forced/cIoU")  # measured by `teacher_forced.py`
PER_TARGET = ("per_target/gIoU", "per_target/cIoU")
PEERS = (*TEACHER_FORCED, *PER_TARGET)

Figures = dict[str, float | None]


def per_target(rows: DataFrame) -> Figures:
    """gIoU and cIoU of MUSE over targets, from `benchmark.rows`; {} for other benchmarks.

    A target missed and a mask too many each count as a pair with an empty mask. gIoU divides the sum of the
    matched IoUs by the larger number, of targets or of masks, of each image; cIoU is the sum of the matched
    pairs' intersections over the sum of all pairs' unions. PixelLM matches by its mask losses and has a
    language model judge the words as well; we match by IoU and judge no words. PixelLM cuts masks at logit 0;
    these were cut at the calibrated threshold.
    """
    if set(rows["benchmark"]) != {"muse"}:
        return {}
    of_image = rows.groupby(rows["uid"].str.rpartition("/")[0])[["n_pred", "n_true"]].sum()
    most, shared = of_image.max(axis=1).sum(), rows["pairs_intersection"].sum()
    joint = rows["areas"].sum() - shared
    return {
        "per_target/gIoU": float(rows["pairs_iou"].sum() / most) if most else None,
        "per_target/cIoU": float(shared / joint) if joint else None,
    }
