"""The kind of thing a noun phrase names, for data sets that give phrases only (ours)."""

from __future__ import annotations

import re

# Where the head of an English noun phrase ends: "a man | in a red shirt", "a dog | lying there".
AFTER_HEAD = re.compile(
    r"\b(in|on|with|at|by|near|under|behind|beside|above|below|between|inside|next|to|from|for|over|that|which|who"
    r"|wearing|holding|sitting|standing|lying|riding|carrying|looking|and)\b"
)
COLLECTIVE = re.compile(
    r"\b((pair|group|bunch|couple|set|pile|row|number|crowd|slice|piece|lot)s?"
    r"|one|two|three|four|some|few|many|most|several|all|both|each|any|none) of\b"
)
IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "sheep": "sheep",
    "knives": "knife",
    "leaves": "leaf",
    "loaves": "loaf",
    "shelves": "shelf",
    "skis": "skis",
    "scissors": "scissors",
    "glasses": "glasses",
    "buses": "bus",
    "tomatoes": "tomato",
    "potatoes": "potato",
}


def singular(word: str) -> str:
    """ "cups" -> "cup", "berries" -> "berry", "brushes" -> "brush", "people" -> "person"."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(ch|sh|ss|x|z)es$", word):
        return word[:-2]
    return word[:-1] if re.search(r"[^sui]s$", word) else word


def head_noun(phrase: str) -> str:
    """Last word of the phrase's head, singular: "12 people" -> "person", "a man in a shirt" -> "man",
    "a pair of shoes" -> "shoe", "one of the dogs" -> "dog". Compounds keep their last word only
    ("tennis racket" -> "racket")."""
    text = COLLECTIVE.sub("", phrase.lower())
    head = AFTER_HEAD.split(text.split(" of ")[0])[0]
    words = re.findall(r"[^\W\d_]+", head) or re.findall(r"[^\W\d_]+", text)
    return singular(words[-1]) if words else ""
