"""CHAIR on answers written by hand, and on the true answers of real photographs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popen.data.tree import read, specs
from popen.evaluation.hallucination import SYNONYMS, Vocabulary, categories, judge, plurals
from popen.masks import encode
from popen.samples import Region, Sample

KINDS = ["cup", "knife", "cell phone", "bear", "teddy bear", "orange", "person", "dining table", "wine glass"]
REAL = Path(os.environ.get("POPEN_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(KINDS)


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("It is the cup {seg}.", {"cup"}),
        ("The Cups {seg} and the KNIVES {seg}", {"cup", "knife"}),
        ("Two cell phones {seg}, a cell-phone, a cellphone, a smartphone {seg}", {"cell phone"}),
        ("the teddy bear {seg}", {"teddy bear"}),  # longest first: no bear
        ("the bears {seg} and a teddy bear {seg}", {"bear", "teddy bear"}),
        ("the mug {seg}", {"cup"}),  # a synonym
        ("people {seg}, two women {seg}", {"person"}),
        ("a cupboard, a hiccup, an orangery", set()),  # inside other words
        ("the orange cup {seg}", {"cup"}),  # a modifier
        ("the orange striped cup {seg}", {"cup"}),
        ("the orange {seg} and the orange on the left {seg}", {"orange"}),
        ("the wine glasses on the table {seg}", {"wine glass", "dining table"}),
        ("There is no knife here.", set()),
        ("I do not see a knife or a cup, only the bear {seg}.", {"bear"}),
        ("No, the cup on the table {seg}.", {"cup", "dining table"}),
        ("There is no knife; the cup {seg} is there.", {"cup"}),
        ("There is no knife {seg}.", {"knife"}),  # it was given a mask all the same
        ("a fork {seg} and an elephant {seg}", set()),  # not annotated in this data set
        ("", set()),
    ],
)
def test_mentioned(vocabulary: Vocabulary, text: str, mentioned: set[str]) -> None:
    assert vocabulary.mentioned(text) == mentioned


def test_a_category_is_never_read_as_the_synonym_of_an_unrelated_one() -> None:
    assert Vocabulary(["ball", "bat"]).mentioned("the ball {seg}") == {"ball"}
    assert Vocabulary(["sports ball"]).mentioned("the ball {seg}") == {"sports ball"}
    assert Vocabulary(["glass", "glasses"]).mentioned("the glasses {seg}") == {"glasses"}


def test_categories_of_one_line_are_one_thing() -> None:
    both = Vocabulary(["man", "person"])
    assert both.mentioned("the man {seg} and the people {seg}") == {both.category("man")}
    assert both.category("man") == both.category("person")


def test_no_word_stands_for_two_things() -> None:
    words = [word.strip() for line in SYNONYMS.strip().splitlines() for word in line.split(",")]
    assert len(words) == len(set(words))


def test_no_categories_no_mentions() -> None:
    assert Vocabulary([]).mentioned("the cup {seg}") == set()


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("cup", "cups"),
        ("knife", "knives"),
        ("toothbrush", "toothbrushes"),
        ("berry", "berries"),
        ("toy", "toys"),
        ("potato", "potatoes"),
        ("mouse", "mice"),
        ("fireman", "firemen"),
        ("bus", "buses"),
        ("hot dog", "hot dogs"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert many in plurals(one)


@given(st.lists(st.sampled_from(KINDS), unique=True), st.booleans())
def test_a_list_mentions_its_items(kinds: list[str], many: bool) -> None:
    words = [min(plurals(kind)) if many else kind for kind in kinds]
    text = "In this picture, " + ", ".join(f"the {word} at the left {{seg}}" for word in words) + "."
    assert Vocabulary(KINDS).mentioned(text) == set(kinds)


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
