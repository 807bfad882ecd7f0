"""Words that tell the things of a picture apart: "the red cup", "the second fork from the left"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from popen.masks import Mask

ORDINALS = ("first", "second", "third", "fourth")
NUMBERS = ("no", "one", "two", "three", "four")

APART = 8.0  # pixels (of 64) between two things of which one is "the left" one
STEP = 5.0  # pixels (of 64) between neighbours that are counted from the left
LARGER = 1.3  # ratio of lengths from which one is "the large" one


@dataclass(frozen=True)
class Thing:
    """One thing in a picture. `name` ("the red cup") is set once all things are known."""

    kind: str
    colour: str
    length: float  # pixels in a picture of 64 a side, as if nothing hid it
    mask: Mask  # what shows of it
    x: float  # centre of what shows, pixels
    y: float
    name: str = ""


def names(things: Sequence[Thing], size: int) -> list[Thing] | None:
    """Things (left to right) with their names; None when two of a kind cannot be told apart.

    A name follows from the picture alone: the place where it is plain, else colour, else size. The first
    word of a name then tells how many there are: one has none, two have sides, more are counted.
    """
    named = []
    for thing in things:
        group = [other for other in things if other.kind == thing.kind]
        word = _word(thing, group, size)
        if word is None:
            return None
        named.append(replace(thing, name=word))
    return named


def _word(thing: Thing, group: list[Thing], size: int) -> str | None:
    if len(group) == 1:
        return f"the {thing.kind}"
    if sideways(group, size):
        return f"the {'left' if thing is group[0] else 'right'} {thing.kind}"
    if upright(group, size):
        return f"the {'top' if thing.y == min(t.y for t in group) else 'bottom'} {thing.kind}"
    if len(group) > 2 and countable(group, size):
        return f"the {ordinal(thing, group)} {thing.kind} from the left"
    if colours_differ(group):
        return f"the {thing.colour} {thing.kind}"
    return f"the {size_word(thing, group)} {thing.kind}" if sizes_differ(group) else None


def colours_differ(group: Sequence[Thing]) -> bool:
    return len({thing.colour for thing in group}) == len(group)


def sizes_differ(group: Sequence[Thing]) -> bool:
    """True for two things of which one is clearly the larger."""
    lengths = sorted(thing.length for thing in group)
    return len(group) == 2 and lengths[1] >= LARGER * lengths[0]


def size_word(thing: Thing, group: Sequence[Thing]) -> str:
    return "large" if thing.length == max(other.length for other in group) else "small"


def sideways(group: Sequence[Thing], size: int) -> bool:
    """True for two things of which one is clearly the left one."""
    return len(group) == 2 and abs(group[1].x - group[0].x) >= APART * size / 64


def upright(group: Sequence[Thing], size: int) -> bool:
    """True for two things of which one is clearly the upper one."""
    return len(group) == 2 and abs(group[1].y - group[0].y) >= APART * size / 64


def countable(group: Sequence[Thing], size: int) -> bool:
    """True when the things (left to right) can be counted from the left without doubt."""
    gaps = [after.x - before.x for before, after in pairwise(group)]
    return bool(gaps) and min(gaps) >= STEP * size / 64


def ordinal(thing: Thing, group: Sequence[Thing]) -> str:
    """Place from the left: "first", "second" ..."""
    return ORDINALS[[other is thing for other in group].index(True)]


def distinctions(group: Sequence[Thing], size: int) -> list[tuple[int, str, str]]:
    """Every way to single one out of two or more things of a kind (left to right).

    Each is (number within the group, sort of words: "colour", "size" or "place", the words), made to
    follow "the one ...": "on the left", "that is red".
    """
    found = []
    if colours_differ(group):
        found += [(n, "colour", f"that is {thing.colour}") for n, thing in enumerate(group)]
    if sizes_differ(group):
        found += [(n, "size", f"that is {'larger' if size_word(t, group) == 'large' else 'smaller'}")
                  for n, t in enumerate(group)]  # fmt: skip
    if sideways(group, size):
        found += [(0, "place", "on the left"), (1, "place", "on the right")]
    if upright(group, size):
        upper = 0 if group[0].y < group[1].y else 1
        found += [(upper, "place", "closer to the top"), (1 - upper, "place", "closer to the bottom")]
    if len(group) > 2 and countable(group, size):
        last = len(group) - 1
        found += [(0, "place", "on the far left"), (last, "place", "on the far right")]
        found += [(1, "place", "in the middle")] if len(group) == 3 else []
    return found


def a(words: str) -> str:
    """The words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def joined(items: Sequence[str], last: str = "and") -> str:
    """ "x", "x and y", "x, y and z"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
