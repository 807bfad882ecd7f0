"""Which words name which kinds, and what an answer claims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popen.model.words import SYNONYMS, Vocabulary, plurals

KINDS = ["cup", "knife", "cell phone", "bear", "teddy bear", "orange", "person", "dining table", "wine glass"]


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


def test_what_lvis_says_in_parentheses_is_not_said_in_answers() -> None:
    street = Vocabulary(["car_(automobile)", "bus_(vehicle)"])
    assert street.mentioned("It is the car {seg} and the bus {seg}.") == {"car", "bus"}
    assert street.category("car_(automobile)") == "car"


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


def test_names_have_their_places(vocabulary: Vocabulary) -> None:
    text = "Bring the KNIVES, not an orange cup."
    named = vocabulary.named(text)
    assert [(text[start:end], category) for start, end, category in named] == [
        ("KNIVES", "knife"),
        ("cup", "cup"),
    ]
