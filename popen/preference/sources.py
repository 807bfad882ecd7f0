"""What P_t's sources of corrections share. A source is the rule, a judge model or people: of a question's
sampled answers it takes the first wrong one, else the first one that it has a correction for.

A correction from outside says for each {seg} which annotated thing it means, by its number. A number is all
it can give: nobody draws masks here. Ours (the paper has an editor correct).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from popen.masks import box
from popen.preference.records import Skipped
from popen.preference.text import Correction
from popen.samples import SEG, Region, Sample

if TYPE_CHECKING:  # torch comes with it
    from popen.model.generate import Answer

Skip = Callable[[Skipped], None]
Source = Callable[[Sequence["Answer"], Sample, Skip], tuple[str, Correction] | None]
"""Sampled answers of a question -> the one that makes the pair, and its correction; None: no pair. What it
has no correction for it gives to the function, with the reason."""

_SPECIAL = re.compile(r"</?\w+>")  # <image>, <seg_0_1>, </s>: as a tokenizer spells what is no word


class UnfitError(ValueError):
    """A correction cannot be used; the message says why."""


def first_wrong(pairs: Iterable[tuple[str, Correction]]) -> tuple[str, Correction] | None:
    """The first pair whose answer is changed, else the first one. Pairs behind it are never computed: with a
    judge each costs a request."""
    first = None
    for pair in pairs:
        if pair[1].changed:
            return pair
        first = first or pair
    return first


def things(sample: Sample) -> list[Region]:
    """Everything annotated in a sample's image: its targets, then the other objects. Numbers start at 1."""
    return [*sample.targets, *(thing for thing in sample.objects if thing not in sample.targets)]


def known(sample: Sample) -> list[dict[str, Any]]:
    """What is known of the truth, for those who correct: number, name, whether the question asks for the
    thing, and its box [left, top, width, height] in pixels of the stored image."""
    return [
        {
            "number": number,
            "name": thing.name,
            "asked_for": number <= len(sample.targets),
            "box": box(thing.rle),
        }
        for number, thing in enumerate(things(sample), start=1)
    ]


def fitted(sampled: str, corrected: str, numbers: Sequence[int], sample: Sample) -> Correction:
    """A correction from outside, checked.

    Args:
        sampled: the model's answer.
        corrected: the same corrected, one {seg} behind every thing that the answer consists of.
        numbers: for each {seg}, the number of the thing that it means (see `things`), 0 for one that is not
            annotated. One 0 leaves the whole answer without masks (no `Correction.targets`), for a mask that
            nobody has checked is no truth.

    Raises UnfitError.
    """
    corrected = corrected.strip()
    if not corrected:
        raise UnfitError("the corrected answer is empty")
    if found := _SPECIAL.search(corrected):
        raise UnfitError(f"the corrected answer holds {found[0]!r}, which is no word; write {SEG} for a mask")
    count = corrected.count(SEG)
    if count != len(numbers):
        raise UnfitError(f"the corrected answer has {count} {SEG}, but {len(numbers)} targets")
    all_things = things(sample)
    for number in numbers:
        if not 0 <= number <= len(all_things):
            raise UnfitError(f"target {number}: the things annotated have the numbers 1 to {len(all_things)}")
    targets = tuple(all_things[number - 1] for number in numbers) if all(numbers) else ()
    return Correction(corrected, targets, corrected != sampled)
