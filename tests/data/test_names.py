"""Names of categories as words."""

from __future__ import annotations

import pytest

from popen.data.names import normal


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ("cup", "cup"),
        (" Traffic_light", "traffic light"),
        ("hair  drier", "hair drier"),
        ("car_(automobile)", "car"),
        ("train_(railroad_vehicle)", "train"),
        ("monitor_(computer_equipment) computer_monitor", "monitor"),
        ("(none)", "(none)"),
        ("", ""),
    ],
)
def test_a_category_as_words(category: str, words: str) -> None:
    assert normal(category) == words
