"""Two small questions drawn by hand: squares of four pixels in images of 8 x 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from popen.evaluation.prediction import Prediction
from popen.masks import Mask, encode
from popen.samples import Region, Sample

Box = tuple[int, int, int, int]  # left, top, width, height


def box(left: int, top: int, width: int, height: int, size: int = 8) -> Mask:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.fixture
def ask() -> Callable[..., Sample]:
    """Make a question: targets and objects as (category, box)."""

    def make(uid: str, targets: list[tuple[str, Box]], objects: list[str], **rest: object) -> Sample:
        fields: dict[str, Any] = {
            "benchmark": uid.split("/")[0],
            "split": uid.split("/")[1],
            "image": f"{uid}.png",
        }
        fields |= {"height": 8, "width": 8, "question": "What is here?"}
        fields["answer"] = "It is " + " and ".join(f"the {name} {{seg}}" for name, _ in targets) + "."
        regions = tuple(Region(f"the {name}", name, encode(box(*where))) for name, where in targets)
        others = tuple(Region(f"the {name}", name, encode(box(0, 0, 1, 1))) for name in objects)
        return Sample(uid=uid, targets=regions, objects=others, **(fields | rest))

    return make


@pytest.fixture
def say() -> Callable[..., Prediction]:
    """Make a prediction: boxes are the masks of the answer's `{seg}`."""

    def make(uid: str, text: str, *boxes: Box, confidence: float = 0.5) -> Prediction:
        return Prediction(uid, text, tuple(encode(box(*where)) for where in boxes), -0.5, confidence, 0.25)

    return make
