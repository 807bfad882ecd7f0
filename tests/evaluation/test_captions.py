"""Caption scores against arithmetic by hand."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from popen.evaluation.captions import cider, meteor, tokenize


def test_tokenize() -> None:
    assert tokenize("The red_cup {seg}, on a man's TABLE-top.") == "the red cup on a man's table top"
    assert tokenize("{seg}") == ""


def test_cider_by_hand() -> None:
    # Two questions with one reference word each, in one document each: idf = log 2. A perfect answer has
    # cosine 1 for single words and 0 for the three longer n-grams (there are none): 10 * 1/4. A wrong one 0.
    assert cider(["cup {seg}", "dog"], ["Cup.", "cat"]) == pytest.approx((2.5 + 0.0) / 2)


def test_cider_of_perfect_long_answers_is_ten() -> None:
    answers = ["one red cup stands here", "four dogs run over grass"]
    assert cider(answers, answers) == pytest.approx(10.0)
    assert np.isnan(cider([], []))


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs a `java` on the PATH")
def test_meteor_of_a_perfect_a_close_and_an_empty_answer() -> None:
    """One call, for Java takes seconds to start: all perfect would be 1, all empty 0."""
    reference = "the red cup stands on the table"
    score = meteor([reference, "a red cup {seg} on the table", "{seg}"], [reference] * 3)
    assert 0.3 < score < 0.8


def test_meteor_needs_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert np.isnan(meteor(["a cup"], ["a cup"]))
