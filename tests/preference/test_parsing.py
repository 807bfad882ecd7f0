"""Taking answers apart: no character is lost, phrases end at their targets, and each names a kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popen.data import muse
from popen.preference.text import category, correct, parse
from popen.samples import SEG, Sample


@pytest.mark.parametrize(
    ("answer", "prefix", "phrases"),
    [
        (
            "you could use the red cup {seg}, the fork {seg} and the knife {seg}.",
            "you could use ",
            ("the red cup", "the fork", "the knife"),
        ),
        (
            "In this picture, the person at the left {seg}, the person at the right {seg} and "
            "the person at the middle {seg}.",
            "In this picture, ",
            ("the person at the left", "the person at the right", "the person at the middle"),
        ),
        (
            "In this picture you can see the second cup from the left {seg}, and knives {seg}",
            "In this picture you can see ",
            ("the second cup from the left", "knives"),
        ),
        ("It is the road {seg}.", "It is ", ("the road",)),
        ("It is the two forks {seg}.", "It is ", ("the two forks",)),
        (
            "There are red cups ({seg}) and two of the forks: {seg}",
            "There are ",
            ("red cups", "two of the forks"),
        ),
        ("The left one {seg} is fine", "", ("The left one",)),
        ("{seg}{seg}", "", ("", "")),
        ("Nothing here.", "Nothing here.", ()),
        ("", "", ()),
    ],
)
def test_parse_by_hand(answer: str, prefix: str, phrases: tuple[str, ...]) -> None:
    parts = parse(answer)
    assert (parts.prefix, parts.phrases) == (prefix, phrases)
    assert parts.render() == answer


def test_a_category_of_lvis_is_found_by_its_words() -> None:
    assert category("the car on the road", ["car_(automobile)", "bus_(vehicle)"]) == "car_(automobile)"


def test_known_names_help_where_grammar_would_cut() -> None:
    answer = "It is the cup that she holds {seg}."
    assert parse(answer).phrases == ("holds",)
    assert parse(answer, ["the cup that she holds", "cup"]).phrases == ("the cup that she holds",)
    assert parse("It is the red cup {seg}.", ["cup"]).phrases == ("the red cup",)
    assert parse("Look at man in blue {seg}.", ["man in blue"]).phrases == ("man in blue",)


fragments = st.sampled_from(
    [SEG, "{seg", "}", " ", ",", ".", "\n", "the ", "a", " and ", "cup", "left", "of "]
)


@given(st.text() | st.lists(fragments | st.text(max_size=3), max_size=25).map("".join))
def test_no_character_is_lost(answer: str) -> None:
    parts = parse(answer, ["the cup", "left", ""])
    assert parts.render() == answer
    assert len(parts.phrases) == answer.count(SEG)
    assert len(parts.joints) == max(len(parts.phrases) - 1, 0)
    assert not any(SEG in text for text in (*parts.phrases, parts.prefix))


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("the red cup", "cup"),
        ("a fork", "fork"),
        ("the knives", "knife"),
        ("two berries", "berry"),
        ("the orange cup on the table", "cup"),
        ("the orange", "orange"),
        ("the cup behind the orange", "cup"),
        ("the big wine glass at the left", "wine glass"),
        ("the pair of scissors", "scissors"),
        ("The Cup", "cup"),
        ("the cupboard", None),
        ("the spoon", None),
        ("", None),
    ],
)
def test_category_of_a_phrase(phrase: str, expected: str | None) -> None:
    kinds = ["berry", "cup", "fork", "glass", "knife", "orange", "scissors", "table", "wine glass"]
    assert category(phrase, kinds) == expected
    assert category(phrase, kinds[::-1]) == expected


@pytest.mark.real_data
@pytest.mark.parametrize(("folder", "split"), [("coco", "train"), ("coco", "test_many"), ("street", "val")])
def test_real_answers_come_apart_at_their_targets(folder: str, split: str) -> None:
    default = Path(__file__).parents[2] / "../shared/data"
    root = Path(os.environ.get("POPEN_REAL_DATA", default)) / folder
    if not root.is_dir():
        pytest.skip(f"{root}: no real photographs there; set POPEN_REAL_DATA")
    samples = [sample for sample in muse.read(root, split) if isinstance(sample, Sample)]
    assert samples
    for sample in samples:
        parts = parse(sample.answer)  # by grammar alone
        assert parts.render() == sample.answer
        assert [p.lower() for p in parts.phrases] == [target.name.lower() for target in sample.targets]
        assert not correct(sample.answer, sample).changed
        # every target but the last forgotten: the correction restores them all
        if len(sample.targets) > 1:
            short = parts.prefix + parts.phrases[-1] + parts.suffix
            assert sorted(t.name for t in correct(short, sample).targets) == sorted(
                t.name for t in sample.targets
            )
