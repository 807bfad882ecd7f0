"""CHAIR on answers written by hand, and on the true answers of real photographs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from popen.data.tree import read, specs
from popen.evaluation.hallucination import categories, judge
from popen.masks import encode
from popen.model.words import Vocabulary
from popen.samples import Region, Sample

KINDS = ["cup", "knife", "cell phone", "bear", "teddy bear", "orange", "person", "dining table", "wine glass"]
REAL = Path(os.environ.get("POPEN_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(KINDS)


def region(category: str) -> Region:
    return Region(f"the {category}", category, encode(np.ones((2, 2), dtype=bool)))


def question(targets: list[str], objects: list[str]) -> Sample:
    return Sample(
        uid="muse/val/0/0",
        benchmark="muse",
        split="val",
        image="x.png",
        height=2,
        width=2,
        question="?",
        answer="",
        targets=tuple(map(region, targets)),
        objects=tuple(map(region, objects)),
    )


def test_judgement_by_hand(vocabulary: Vocabulary) -> None:
    sample = question(["cup", "cup", "knife"], ["cup", "cup", "knife", "orange"])
    said = judge(sample, "The cup {seg}, an orange {seg} and two bears {seg}.", vocabulary)
    assert said.mentioned == {"cup", "orange", "bear"}
    assert said.hallucinated == {"bear"}
    assert said.missing == ("knife",)
    assert said.targets == 3


def test_without_annotated_objects_nothing_can_be_hallucinated(vocabulary: Vocabulary) -> None:
    said = judge(question(["cup", ""], []), "The bear {seg}.", vocabulary)
    assert (said.mentioned, said.hallucinated) == (frozenset(), frozenset())
    assert (said.missing, said.targets) == (("cup",), 1)  # the target without a category is not counted


@pytest.mark.real_data
@pytest.mark.parametrize("tree", ["coco", "street"])
def test_true_answers_about_real_photographs_neither_hallucinate_nor_miss(tree: str) -> None:
    if not (REAL / tree).is_dir():
        pytest.skip(f"no real photographs in {REAL / tree} (set POPEN_REAL_DATA)")
    judged = 0
    for spec in specs(REAL / tree):
        samples = [sample for sample in read(REAL / tree, spec) if isinstance(sample, Sample)]
        known = Vocabulary(categories(samples))
        for sample in samples:
            said = judge(sample, sample.answer, known)
            assert not said.hallucinated, (sample.answer, said)
            assert not said.missing, (sample.answer, said)
            judged += bool(said.mentioned)
    assert judged > 100
