"""Names of categories as words."""

from __future__ import annotations

import re


def normal(category: str) -> str:
    """A category as words: lower case, single blanks ("Traffic_light" -> "traffic light"), without what LVIS
    says in parentheses and behind them ("car_(automobile)" -> "car", "monitor_(computer_equipment)
    computer_monitor" -> "monitor"): no answer says "the car (automobile)"."""
    words = category.partition("(")[0].strip(" _") or category
    return " ".join(re.split(r"[\s_]+", words.strip().lower()))
