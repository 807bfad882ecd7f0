"""Words for kinds of things. The table, the reading of compounds ("orange cup" is a cup) and of negation
("there is no fork" claims no fork) are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from popen.data.names import normal
from popen.samples import SEG

# Each line: words for one kind of thing, in the words of COCO, street scenes and table tops. Categories
# of one line count as one ("man" and "person" in a data set that has both).
SYNONYMS = """
person, people, pedestrian, man, woman, boy, girl, child, kid, lady, guy, human, passer-by
bicyclist, cyclist
bicycle, bike
motorcycle, motorbike
car, automobile
truck, lorry
airplane, aeroplane, plane, aircraft
traffic light, traffic signal
sign, traffic sign, road sign
fire hydrant, hydrant
pavement, sidewalk, footpath
road, street
building, house
pole, post, lamp post
cat, kitten
dog, puppy
cow, cattle
backpack, rucksack
handbag, purse
tie, necktie
skis, ski
sports ball, ball
tennis racket, racket, racquet, tennis racquet
wine glass, wineglass, glass, goblet
cup, mug, teacup
donut, doughnut
couch, sofa, settee
potted plant, houseplant, plant
dining table, table
tv, television, tv set
laptop, notebook computer
remote, remote control
cell phone, mobile phone, smartphone, telephone, phone, mobile, cellphone
microwave, microwave oven
refrigerator, fridge
hair drier, hair dryer, hairdryer
teddy bear, teddy
light bulb, bulb, lightbulb
pot, saucepan
pan, frying pan
"""
_IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "foot": "feet", "tooth": "teeth",
              "goose": "geese", "sheep": "sheep", "scissors": "scissors", "cattle": "cattle"}  # fmt: skip
# "orange" before any other word than these is a colour: "the orange striped cup".
_AFTER_A_NOUN = (
    "and or nor but is are was were has have can could may might would will on in at to of by from with near "
    "next behind before beside under over above below between left right that which who here there as for "
    "sits lies stands rests hangs"
).replace(" ", "|")
_CLAUSE_END = re.compile(rf"({re.escape(SEG)}|[.;:!?]|\bbut\b)")
_NEGATION = re.compile(r"\b(?:no(?!,)|not(?! only)|without|neither|never|cannot|\w+n['’]t)\b")


def plurals(noun: str) -> set[str]:
    """Ways to write the plural of a noun, lower case; of several words the last one bends."""
    *front, head = noun.split(" ")
    if head in _IRREGULAR:
        forms = {_IRREGULAR[head]}
    elif head.endswith("man"):
        forms = {head[:-3] + "men"}
    elif re.search(r"[^aeiou]y$", head):
        forms = {head[:-1] + "ies"}
    elif re.search(r"(s|x|z|ch|sh)$", head):
        forms = {head + "es"}
    elif head.endswith("o"):
        forms = {head + "s", head + "es"}
    elif re.search(r"fe?$", head):
        forms = {head + "s", re.sub(r"fe?$", "ves", head)}
    else:
        forms = {head + "s"}
    return {" ".join([*front, form]) for form in forms}


def _squeezed(form: str) -> str:
    """Spelling without blanks and hyphens: "cell-phone", "cell phone" and "cellphone" are one word."""
    return re.sub(r"[\s-]", "", form)


class Vocabulary:
    """The words for the categories of a data set.

    Only these can be mentioned: of a thing that nobody annotated we cannot know that it is absent.
    """

    def __init__(self, categories: Iterable[str]) -> None:
        known = sorted({normal(category) for category in categories} - {""})
        meaning = {category: category for category in known}
        for line in SYNONYMS.strip().splitlines():
            words = [normal(word) for word in line.split(",")]
            category = next((word for word in words if word in meaning), None)
            if category is not None:
                meaning |= dict.fromkeys(words, category)
        for word, category in list(meaning.items()):
            meaning = dict.fromkeys(plurals(word), category) | meaning  # a name beats another's plural
        self._category = {_squeezed(form): category for form, category in meaning.items()}
        longest_first = sorted(meaning, key=lambda form: (-len(form), form))
        forms = "|".join(r"[\s-]?".join(map(re.escape, re.split("[ -]", form))) for form in longest_first)
        # A form directly before another one is its modifier; so is a colour before any other noun.
        self._pattern = re.compile(
            rf"(?<![\w-])(?!orange\s+(?!(?:{_AFTER_A_NOUN})\b)\w)({forms})(?!\w)(?!(?:\s+|-)(?:{forms})(?!\w))"
            if forms
            else r"(?!)()"
        )

    def category(self, name: str) -> str:
        """The one name that this vocabulary uses for a category it was made from."""
        return self._category[_squeezed(normal(name))]

    def named(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and category of every name in the text."""
        found = self._pattern.finditer(text.lower())
        return [(name.start(1), name.end(1), self._category[_squeezed(name[1])]) for name in found]

    def mentioned(self, text: str) -> set[str]:
        """Categories that the answer claims to be there; `{seg}` marks stay in the text.

        A mention after a negation in its clause is no claim, unless it is the one that got a mask.
        """
        pieces = _CLAUSE_END.split(text.lower())
        claimed: set[str] = set()
        for clause, end in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            found = list(self._pattern.finditer(clause))
            negation = _NEGATION.search(clause)
            for place, mention in enumerate(found):
                masked = end == SEG and place == len(found) - 1
                if masked or negation is None or mention.start() < negation.start():
                    claimed.add(self._category[_squeezed(mention[1])])
        return claimed
