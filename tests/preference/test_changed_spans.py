"""Which tokens of winner and loser changed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from popen.preference.text import changed_spans


def test_changed_spans_by_hand() -> None:
    assert changed_spans([1, 2, 3, 9], [1, 2, 3, 9]) == ([False] * 4, [False] * 4)
    assert changed_spans([1, 2, 9], [1, 2, 7, 8, 9]) == ([False] * 3, [False, False, True, True, False])
    assert changed_spans([1, 5, 6, 9], [1, 7, 9]) == ([False, True, True, False], [False, True, False])
    assert changed_spans([], [4]) == ([], [True])


@given(st.lists(st.integers(0, 4), max_size=300), st.lists(st.integers(0, 4), max_size=300))
def test_unchanged_tokens_are_the_same_on_both_sides(chosen: list[int], rejected: list[int]) -> None:
    marks = changed_spans(chosen, rejected)
    kept = [
        [token for token, changed in zip(tokens, mark, strict=True) if not changed]
        for tokens, mark in zip((chosen, rejected), marks, strict=True)
    ]
    assert kept[0] == kept[1]


def test_frequent_tokens_of_long_answers_still_match() -> None:
    # SequenceMatcher's autojunk would drop a token that makes up 1 % of 200 or more
    tokens = [1, 2] * 150
    assert changed_spans([3, *tokens], tokens) == ([True] + [False] * 300, [False] * 300)
