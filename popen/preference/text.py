"""P_t: take an answer apart, correct it by the ground truth, and mark the tokens that changed.

The corrected answer keeps the words the model chose wherever they are right: a pair that also differs in
style teaches style. The rules are ours and written for English answers; a judge model or a person may take
their place. They see phrases that carry a mask only: a wrong thing mentioned in passing stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from popen.data.names import normal
from popen.data.nouns import singular
from popen.samples import SEG, Region, Sample

DRAWN = 0.5  # IoU from which on a phrase's mask is that of a target
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_STOP = re.compile(r"[.,;:!?()\n]")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_DETERMINERS = _set(
    "the a an this these those some any another both each every one two three four five six "
    "its his her their your my our"
)
_PREPOSITIONS = _set(
    "at on in of to from by near under over above below behind beside between with against inside for"
)
_CONJUNCTIONS = _set("and or plus then also")
_CLAUSE = _set(  # words a phrase cannot contain, so that it starts after the last of them
    "i you we it they he she there is are was were be would could should must "
    "see use need want have has choose pick show shows"
)
_NUMBER = (
    ("it is", "they are"),
    ("here is", "here are"),
    ("there is", "there are"),
    ("this is", "these are"),
)


@dataclass(frozen=True)
class Answer:
    """An answer in parts: prefix, phrase, joint, phrase, ..., phrase, suffix. Every {seg} lies in the joint
    or suffix that follows its phrase, so an answer with phrases has one joint less than phrases. An answer
    without {seg} is all prefix."""

    prefix: str
    phrases: tuple[str, ...]
    joints: tuple[str, ...]
    suffix: str

    def render(self) -> str:
        """The text: `parse(text).render() == text` for any text."""
        joined = "".join(
            phrase + seam for phrase, seam in zip(self.phrases, (*self.joints, self.suffix), strict=False)
        )
        return self.prefix + joined


@dataclass(frozen=True)
class Correction:
    """A corrected answer; `targets` in the order of its {seg}, empty where not all of them are known;
    `changed` tells whether it differs at all."""

    answer: str
    targets: tuple[Region, ...]
    changed: bool


def parse(answer: str, names: Sequence[str] = ()) -> Answer:
    """Take an answer apart without losing a character.

    A phrase is the noun phrase that ends at its {seg}: "the red cup" of "you could use the red cup {seg}".

    Args:
        answer: any text, with one {seg} behind every phrase.
        names: names of known things; where one ends at a {seg} it is the phrase even where the grammar below
            would have cut it short.
    """
    *parts, tail = answer.split(SEG)
    if not parts:
        return Answer(answer, (), (), "")
    phrases, seams, seam = [], [], ""
    for part in parts:
        start, end = _noun_phrase(part, names)
        phrases.append(part[start:end])
        seams.append(seam + part[:start])
        seam = part[end:] + SEG
    return Answer(seams[0], tuple(phrases), tuple(seams[1:]), seam + tail)


def category(phrase: str, categories: Sequence[str]) -> str | None:
    """The kind of thing a phrase names, or None for none of `categories` (simple plurals count).

    A category found before the phrase's first preposition counts most, the one that ends last, then the
    longest: "the orange cup on the table" is a cup, "the wine glass" no glass where there are wine glasses.
    One behind the preposition counts where there is none before it ("the pair of scissors").
    """
    words = _words(phrase)
    head = next((i for i, word in enumerate(words) if i and word in _PREPOSITIONS), len(words))
    found = []
    for name in categories:
        parts = _words(normal(name))
        for start in range(len(words) - len(parts) + 1) if parts else ():
            end = start + len(parts)
            if words[start : end - 1] == parts[:-1] and singular(words[end - 1]) == singular(parts[-1]):
                found.append(((start < head, end if start < head else -start, len(parts), len(name)), name))
    return max(found)[1] if found else None


def correct(sampled: str, sample: Sample, ious: Sequence[Sequence[float]] = ()) -> Correction:
    """Correct a sampled answer by the ground truth (P_t's rule).

    Phrases are matched to targets by name, then by kind and mask ("the left cup" for the red cup, where its
    mask is the red cup's), then where they can mean no other thing ("a cup" for the only red cup), then by
    kind alone; a phrase of the right kind only is replaced by the target's name. Phrases left over
    name no target (absent, not asked for, or said twice) and are removed; targets left over are inserted at
    the place of their order in `sample.targets`. Names of one kind tell its things apart and how many there
    are, so they go together: unless all of a kind were right and as many as asked for, all get their names
    and order from `sample`. Prefix, suffix and the style of the list stay the model's
    own; only "it is" becomes "they are" (and the like) where the number of things changed and the data set's
    answer says so. Where no phrase could be matched, and where something is removed or inserted in a sentence
    that is more than a list ("put the pan on the stove"), the answer of the data set takes its place. An
    answer without phrases is right when there is no target, whatever its words; about targets without names,
    so is one with as many phrases.

    A phrase is matched by the categories of the sample alone, so a synonym ("mug") counts as wrong.

    Args:
        sampled: the model's answer.
        sample: the question with its true answer.
        ious: IoU of each phrase's mask with each target's, [phrase][target]; none: words alone decide.
    """
    things = (*sample.targets, *sample.objects)
    answer = parse(sampled, [thing.name for thing in things])
    nameless = all(not target.name and not target.category for target in sample.targets)
    if nameless and len(answer.phrases) == len(sample.targets):
        return Correction(sampled, sample.targets, changed=False)
    kept = _match(answer.phrases, sample, ious)
    mentions = list(kept)
    for index in range(len(sample.targets)):
        if all(index != other for other, _ in kept):
            place = next((i for i, (other, _) in enumerate(mentions) if other > index), len(mentions))
            mentions.insert(place, (index, None))
    others = len(kept) < max(len(answer.phrases), len(mentions))
    if not kept or (others and not _is_list(answer)):
        return Correction(sample.answer, sample.targets, changed=sample.answer != sampled)
    order, phrases = _together(mentions, answer.phrases, sample)
    if _opens(answer):
        phrases = [_upper(phrases[0]), *(_lower(phrase) for phrase in phrases[1:])]
    prefix = answer.prefix
    if (len(phrases) == 1) != (len(answer.phrases) == 1):
        prefix = _agreeing(prefix, parse(sample.answer).prefix)
    corrected = Answer(prefix, tuple(phrases), _joints(answer, len(phrases)), answer.suffix).render()
    return Correction(corrected, tuple(sample.targets[index] for index in order), corrected != sampled)


def changed_spans(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Token ids of winner and loser -> which tokens of each are not in the other's (a longest-match diff).

    A removed phrase marks tokens of the loser only, an inserted one tokens of the winner only.
    """
    marks = [True] * len(chosen), [True] * len(rejected)
    for block in SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        for mark, start in zip(marks, (block.a, block.b), strict=True):
            mark[start : start + block.size] = [False] * block.size
    return marks


def _noun_phrase(text: str, names: Sequence[str]) -> tuple[int, int]:
    """Start and end (characters) of the noun phrase that ends `text`, without punctuation behind it."""
    matches = list(_WORD.finditer(text))
    if not matches:
        return len(text), len(text)
    words = [match[0].lower() for match in matches]
    end = matches[-1].end()

    start = 1 if words[0] in _CONJUNCTIONS and len(words) > 1 else 0
    for i in range(1, len(words)):
        if words[i - 1] in _CLAUSE or _STOP.search(text, matches[i - 1].end(), matches[i].start()):
            start = i
    # a lone "one" ("the left one") is a noun, hence no determiner at the very end
    determiners = [i for i in range(start, len(words) - 1) if words[i] in _DETERMINERS]
    for i in reversed(determiners):
        # further back from "the left" in "the person at the left", from "two" in "the two cups"
        if i == determiners[-1] or i == start - 1 or words[start - 1] in _PREPOSITIONS:
            start = i
        else:
            break

    places = {match.start(): i for i, match in enumerate(matches)}
    for name in sorted(names, key=len, reverse=True):
        place = places.get(end - len(name))
        if place is not None and text[end - len(name) : end].lower() == name.lower():
            # a bare kind ("cup") must not cut a phrase that has its determiner ("the red cup") short
            start = min(place, start) if determiners else place
            break
    return matches[start].start(), end


def _kinds(phrases: Sequence[str], sample: Sample) -> list[str | None]:
    """The kind that each phrase names, of those in the image."""
    things = (*sample.targets, *sample.objects)
    categories = sorted({thing.category for thing in things if thing.category})
    return [category(phrase, categories) for phrase in phrases]


def _together(
    mentions: Sequence[tuple[int, str | None]], said: Sequence[str], sample: Sample
) -> tuple[list[int], list[str]]:
    """The targets' order and phrases, those of a kind as said or as the data set has them, all of them."""
    kinds = _kinds(said, sample)
    order = [index for index, _ in mentions]
    phrases = [sample.targets[index].name if phrase is None else phrase for index, phrase in mentions]
    for kind in {sample.targets[index].category for index in order} - {""}:
        places = [i for i, index in enumerate(order) if sample.targets[index].category == kind]
        right = all(mentions[i][1] is not None for i in places)
        if not right or kinds.count(kind) != len(places):
            for i, index in zip(places, sorted(order[i] for i in places), strict=True):
                order[i], phrases[i] = index, sample.targets[index].name
    return order, phrases


def _match(
    phrases: Sequence[str], sample: Sample, ious: Sequence[Sequence[float]]
) -> list[tuple[int, str | None]]:
    """(index of the target, the phrase or None where its kind alone is right) of each phrase that names a
    target, in the phrases' order."""
    things = (*sample.targets, *sample.objects)
    kinds = _kinds(phrases, sample)

    def same_name(p: int, t: int) -> bool:
        return _words(phrases[p]) == _words(sample.targets[t].name)

    def same_mask(p: int, t: int) -> bool:
        others = [_words(thing.name) for thing in things if thing.rle != sample.targets[t].rle]
        drawn = bool(ious) and ious[p][t] >= DRAWN
        return drawn and same_kind(p, t) and _words(phrases[p]) not in others

    def means(p: int, t: int) -> bool:
        target = sample.targets[t]
        said = _content(phrases[p])
        fits = [
            thing for thing in things if thing.category == target.category and said <= _content(thing.name)
        ]
        unique = target in fits and all(thing.rle == target.rle for thing in fits)
        return kinds[p] == target.category and unique

    def same_kind(p: int, t: int) -> bool:
        return kinds[p] == sample.targets[t].category

    found: dict[int, tuple[int, str | None]] = {}
    free = set(range(len(sample.targets)))
    pairs = [(p, t) for p in range(len(phrases)) for t in sorted(free)]
    if ious:  # things of one name ("the cup", twice) are told apart by their masks alone
        pairs.sort(key=lambda pair: -ious[pair[0]][pair[1]])
    # surest first, or a wrong phrase takes another's target
    for rule in (same_name, same_mask, means, same_kind):
        for p, t in pairs:
            if p not in found and t in free and rule(p, t):
                found[p] = t, None if rule is same_kind else phrases[p]
                free.remove(t)
    return [found[p] for p in sorted(found)]


def _is_list(answer: Answer) -> bool:
    """Whether commas and conjunctions alone join the phrases: other words say how things belong together."""
    return all(word in _CONJUNCTIONS for joint in answer.joints for word in _words(joint.replace(SEG, " ")))


def _joints(answer: Answer, count: int) -> tuple[str, ...]:
    """Joints for `count` phrases in the style of the answer's own."""
    if count == len(answer.phrases):
        return answer.joints
    seams = (*answer.joints, answer.suffix)
    gap = seams[0].partition(SEG)[0] + SEG
    last = answer.joints[-1] if answer.joints else gap + " and "
    middle = answer.joints[0] if len(answer.joints) > 1 else gap + ", "
    if count == 2:
        last = re.sub(r",(?=\s+(?:and|or)\b)", "", last)  # a list of two has no serial comma
    return (*[middle] * (count - 2), last)[: count - 1]


def _agreeing(prefix: str, model: str) -> str:
    """The prefix with its "is" or "are" in the number of the model's, where both end in the same opening."""
    for pair in _NUMBER:
        for said, right in (pair, pair[::-1]):
            if prefix.lower().endswith(said + " ") and model.lower().endswith(right + " "):
                start = len(prefix) - len(said) - 1
                return prefix[:start] + (_upper(right) if prefix[start].isupper() else right) + " "
    return prefix


def _opens(answer: Answer) -> bool:
    """Whether the first phrase opens the answer with a capital."""
    return not _WORD.search(answer.prefix) and answer.phrases[0][:1].isupper()


def _upper(phrase: str) -> str:
    return phrase[:1].upper() + phrase[1:]


def _lower(phrase: str) -> str:
    """Undo the capital of a phrase that no longer opens the answer ("The cup"), not that of a proper name."""
    opens = _words(phrase)[:1]
    return phrase[:1].lower() + phrase[1:] if opens and opens[0] in _DETERMINERS else phrase


def _words(text: str) -> list[str]:
    return [match[0].lower() for match in _WORD.finditer(text)]


def _content(phrase: str) -> set[str]:
    return set(_words(phrase)) - _DETERMINERS
