"""How large the published splits are, to tell a whole copy of a data set from a part of one.

Only numbers that we are certain of. RefCOCO, RefCOCO+ and RefCOCOg: the splits of the referring-expression
API (`unc`, `umd`; Yu et al. 2016, Nagaraja et al. 2016); they add up to the published 142,210, 141,564 and
95,010 sentences on 19,994, 19,992 and 25,799 images. ReasonSeg: LISA's README. MUSE: PixelLM's paper, which
rounds, and gives its two test files together (4.3 thousand); of GranD_f's human-annotated part no number is
known here.
"""

from __future__ import annotations

from dataclasses import dataclass

from popen.data.tree import SPLITS


@dataclass(frozen=True)
class Size:
    """Images and questions of a split; None: not known here. A rounded size is shown, never held against
    a tree."""

    images: int | None = None
    questions: int | None = None
    rounded: bool = False

    def __str__(self) -> str:
        about = "about " if self.rounded else ""
        known = [(self.images, "images"), (self.questions, "questions")]
        return ", ".join(f"{about}{n:,} {what}" for n, what in known if n is not None) or "not known here"


SIZES: dict[str, Size] = {
    f"{name}/{split}": Size()
    for name, splits in SPLITS.items()
    for split in splits
    if (name, split) != ("muse", "preference")  # ours, not MUSE's
} | {
    "muse/train": Size(questions=239_000, rounded=True),
    "muse/val": Size(questions=2_800, rounded=True),
    "refcoco/train": Size(16_994, 120_624),
    "refcoco/val": Size(1_500, 10_834),
    "refcoco/testA": Size(750, 5_657),
    "refcoco/testB": Size(750, 5_095),
    "refcoco+/train": Size(16_992, 120_191),
    "refcoco+/val": Size(1_500, 10_758),
    "refcoco+/testA": Size(750, 5_726),
    "refcoco+/testB": Size(750, 4_889),
    "refcocog/train": Size(21_899, 80_512),
    "refcocog/val": Size(1_300, 4_896),
    "refcocog/test": Size(2_600, 9_602),
    "reasonseg/train": Size(images=239),
    "reasonseg/val": Size(images=200),
    "reasonseg/test": Size(images=779),
}
