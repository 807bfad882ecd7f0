"""Questions about a scene, with their targets and the way their answer begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from popen.data.scenes.composition import Scene
from popen.data.scenes.facts import DANGER, MATERIAL, NUTRITION, USES, Fact
from popen.data.scenes.kinds import KINDS, PARTNERS, plural
from popen.data.scenes.phrases import (
    NUMBERS,
    Thing,
    a,
    colours_differ,
    countable,
    distinctions,
    joined,
    ordinal,
    size_word,
    sizes_differ,
)
from popen.samples import SEG

NOTHING = "there is nothing like that here."
MOST_TARGETS = 6  # no question asks for more: answers stay short

# How often each kind of question is tried first.
WEIGHTS: dict[str, float] = {
    "use": 2.2,
    "list": 2.6,
    "order": 1.2,
    "place": 1.5,
    "colour": 1.1,
    "size": 1.3,
    "number": 0.9,
    "nutrition": 0.9,
    "danger": 0.8,
    "material": 0.8,
    "name": 0.8,
}
ABSENT = 0.03  # share of questions to which the answer is "nothing"


@dataclass(frozen=True)
class Question:
    """`wordings` are (question, opening of the answer); `targets` number things, left to right.

    `named` are the kinds that the question asks for by name, in its order.
    """

    kind: str
    wordings: tuple[tuple[str, str], ...]
    targets: tuple[int, ...]
    named: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A question in the words chosen for it."""

    kind: str
    text: str
    opening: str  # how its answer begins: "you could use"
    targets: tuple[int, ...]
    other: str = ""  # the same question in other words, where there are any
    named: tuple[str, ...] = ()


def answer_text(opening: str, names: list[str]) -> str:
    """The answer: its opening, then each target's name with its mask's place."""
    if not names:
        return NOTHING
    if len(names) > 1:
        opening = {"it is": "they are", "here is": "here are"}.get(opening, opening)
    return f"{opening} {joined([f'{name} {SEG}' for name in names])}."


def ask(
    scene: Scene, rng: np.random.Generator, count: int, least: int = 1, most: int = MOST_TARGETS
) -> list[Asked]:
    """Up to `count` different questions with `least` to `most` targets, of mixed kinds.

    With `least` 1, a few have no target at all.
    """
    pool: dict[str, list[Question]] = {}
    for question in possible(scene, rng):
        if least <= len(question.targets) <= most:
            pool.setdefault(question.kind, []).append(question)
    chosen: list[Asked] = []
    seen: set[tuple[str, tuple[int, ...]]] = set()
    # Where only long answers will do, lists would crowd out the rest.
    weights = dict(WEIGHTS) if least <= 1 else dict.fromkeys(WEIGHTS, 1.0)
    while len(chosen) < count:
        if least <= 1 and rng.random() < ABSENT:
            chosen.append(_absent(scene, rng))
            continue
        open_kinds = [kind for kind in WEIGHTS if pool.get(kind)]
        if not open_kinds:
            break
        share = np.array([weights[kind] for kind in open_kinds])
        kind = open_kinds[int(rng.choice(len(open_kinds), p=share / share.sum()))]
        question = _draw(scene, rng, pool[kind])
        pool[kind].remove(question)
        if (kind, question.targets) not in seen:
            seen.add((kind, question.targets))
            weights[kind] *= 0.3
            chosen.append(_word(question, rng))
    return chosen


def possible(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question there is about a scene; chance only picks the absent things that lists ask for."""
    return [*_facts(scene), *_relations(scene), *_listings(scene, rng)]


def _word(question: Question, rng: np.random.Generator) -> Asked:
    (text, opening), *others = [question.wordings[int(n)] for n in rng.permutation(len(question.wordings))]
    other = others[0][0] if others else ""
    return Asked(question.kind, text, opening, question.targets, other, question.named)


def _draw(scene: Scene, rng: np.random.Generator, questions: list[Question]) -> Question:
    """One of the questions: sooner one with few targets, and one whose targets have a twin."""
    counts = scene.counts
    twins = [np.mean([counts[scene.things[n].kind] > 1 for n in question.targets]) for question in questions]
    weights = np.array(
        [
            (0.4 + 1.6 * twin) / (1 + len(question.targets))
            for question, twin in zip(questions, twins, strict=True)
        ]
    )
    return questions[int(rng.choice(len(questions), p=weights / weights.sum()))]


def _wordings(opening: str, *texts: str) -> tuple[tuple[str, str], ...]:
    return tuple((text, opening) for text in texts)


def _of(scene: Scene, kinds: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(number for number, thing in enumerate(scene.things) if thing.kind in kinds)


def _groups(scene: Scene) -> Iterator[tuple[tuple[int, ...], list[Thing]]]:
    """Each kind that is there more than once: numbers and things, left to right."""
    for kind, count in scene.counts.items():
        if count > 1:
            numbers = scene.of_kind(kind)
            yield numbers, [scene.things[number] for number in numbers]


def _facts(scene: Scene) -> Iterator[Question]:
    """Use, nutrition, danger and material."""
    for goal, kinds in USES.items():
        wordings = (
            (f"what would i need to {goal}?", "you would need"),
            (f"what could i use to {goal}?", "you could use"),
            (f"i want to {goal}. what should i take?", "you should take"),
            (f"which things here help me to {goal}?", "you could use"),
        )
        yield from _whole_or_one(scene, "use", wordings, kinds)
    facts: tuple[tuple[str, tuple[Fact, ...]], ...] = (
        ("nutrition", NUTRITION), ("danger", DANGER), ("material", MATERIAL),
    )  # fmt: skip
    for kind, entries in facts:
        for texts, kinds in entries:
            yield from _whole_or_one(scene, kind, _wordings("it is", *texts), kinds)


def _whole_or_one(
    scene: Scene, kind: str, wordings: tuple[tuple[str, str], ...], kinds: tuple[str, ...]
) -> Iterator[Question]:
    """Ask for everything of the kinds; where that is one kind more than once, also for one of them."""
    targets = _of(scene, kinds)
    if not targets:
        return
    yield Question(kind, wordings, targets)
    group = [scene.things[number] for number in targets]
    if len(group) > 1 and len({thing.kind for thing in group}) == 1:
        for number, _, words in distinctions(group, scene.size):
            narrowed = tuple(
                (f"{text} {lead} the one {words}.", opening)
                for (text, opening), lead in zip(
                    wordings, ("take", "i like", "show me", "i mean"), strict=False
                )
            )
            yield Question(kind, narrowed, (targets[number],))


def _relations(scene: Scene) -> Iterator[Question]:
    """Order, place, colour and size."""
    for numbers, group in _groups(scene):
        kind = group[0].kind
        many = plural(kind)
        if countable(group, scene.size):
            for number, thing in zip(numbers, group, strict=True):
                left, right = ordinal(thing, group), ordinal(thing, group[::-1])
                texts = [
                    f"which is the {left} {kind} from the left?",
                    f"show me the {left} {kind} from the left.",
                ]
                texts += [f"counting from the right, where is the {right} {kind}?"]
                yield Question("order", _wordings("it is", *texts), (number,))
        for place, sort, words in distinctions(group, scene.size):
            texts = [f"where is the {kind} {words}?", f"of the {many}, which is the one {words}?"]
            texts += [f"find the {kind} {words}."]
            yield Question(sort, _wordings("it is", *texts), (numbers[place],))
        if len(group) == 2 and colours_differ(group):
            for number, other in ((numbers[0], group[1]), (numbers[1], group[0])):
                yield Question(
                    "colour", _wordings("it is", f"which {kind} is not {other.colour}?"), (number,)
                )
        if sizes_differ(group):
            for number, thing in zip(numbers, group, strict=True):
                word = size_word(thing, group)
                texts = [f"which {kind} is the {word} one?", f"please find the {word} {kind}."]
                yield Question("size", _wordings("it is", *texts), (number,))
    for colour in {thing.colour: None for thing in scene.things}:
        targets = tuple(n for n, thing in enumerate(scene.things) if thing.colour == colour)
        texts = [f"which things are {colour}?", f"what here is {colour}?", f"show me everything {colour}."]
        yield Question("colour", _wordings("it is", *texts), targets)
        rest = tuple(n for n in range(len(scene.things)) if n not in targets)
        if rest:
            texts = [f"which things are not {colour}?", f"show me all that is not {colour}."]
            yield Question("colour", _wordings("it is", *texts), rest)
    yield from _around(scene)


def _around(scene: Scene) -> Iterator[Question]:
    """Places relative to the table and to things that are there once."""
    things, gap = scene.things, 5.0 * scene.size / 64
    by_height = sorted(range(len(things)), key=lambda number: things[number].y)
    for number, other, coordinate, side in (
        (0, 1, "x", "left"),
        (len(things) - 1, len(things) - 2, "x", "right"),
        (by_height[0], by_height[1], "y", "top"),
        (by_height[-1], by_height[-2], "y", "bottom"),
    ):
        if abs(getattr(things[number], coordinate) - getattr(things[other], coordinate)) >= gap:
            texts = [f"what is closest to the {side} edge?", f"which thing is the one nearest the {side}?"]
            yield Question("place", _wordings("it is", *texts), (number,))
    for coordinate, sides in (("x", ("left", "right")), ("y", ("top", "bottom"))):
        off = [getattr(thing, coordinate) - scene.size / 2 for thing in things]
        if min(map(abs, off)) >= gap / 2:
            for side, sign in zip(sides, (-1, 1), strict=True):
                found = tuple(n for n, distance in enumerate(off) if distance * sign > 0)
                texts = [f"what is in the {side} half?", f"name everything in the {side} half of the table."]
                if found:
                    yield Question("place", _wordings("it is", *texts), found)
    for number, thing in enumerate(things):
        if scene.counts[thing.kind] > 1:
            continue
        others = [n for n in range(len(things)) if n != number]
        far = {n: float(np.hypot(things[n].x - thing.x, things[n].y - thing.y)) for n in others}
        near, second = sorted(others, key=far.__getitem__)[:2]
        if far[second] >= 1.3 * far[near]:
            texts = [f"what is next to the {thing.kind}?", f"which thing is nearest to the {thing.kind}?"]
            yield Question("place", _wordings("it is", *texts), (near,))
        if all(abs(things[n].x - thing.x) >= gap for n in others):
            beside = (("left", range(number)), ("right", range(number + 1, len(things))))
            for side, row in beside:
                texts = [
                    f"what is to the {side} of the {thing.kind}?",
                    f"name the things {side} of the {thing.kind}.",
                ]
                if row:
                    yield Question("place", _wordings("it is", *texts), tuple(row))


def _listings(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Names, lists of things (some absent) and numbers."""
    counts = scene.counts
    present = list(counts)
    for kind, count in counts.items():
        word = kind if count == 1 else plural(kind)
        texts = [
            f"where {'is' if count == 1 and kind != 'scissors' else 'are'} the {word}?",
            f"find every {kind}.",
        ]
        yield Question("name", _wordings("it is", *texts), scene.of_kind(kind))
    for number in (1, 2, 3):
        same = tuple(kind for kind in present if counts[kind] == number)
        if same and len(same) < len(present):
            texts = [f"of which kind is there {'only ' if number == 1 else 'exactly '}{NUMBERS[number]}?"]
            texts += (
                [f"what do you see {NUMBERS[number]} of?"] if number > 1 else ["which things have no twin?"]
            )
            yield Question("number", _wordings("it is", *texts), _of(scene, same))
        for kind in same if number > 1 else ():
            texts = [
                f"where are the {NUMBERS[number]} {plural(kind)}?",
                f"i need {NUMBERS[number]} {plural(kind)}.",
            ]
            yield Question("number", _wordings("here is", *texts), scene.of_kind(kind))
    several = tuple(kind for kind in present if counts[kind] > 1)
    if len(several) > 1:
        texts = ["what is there more than one of?", "which things have a twin?"]
        yield Question("number", _wordings("it is", *texts), _of(scene, several))
    absent = [kind for kind in KINDS if kind not in counts]
    expected = [PARTNERS[kind] for kind in present if PARTNERS[kind] in absent]
    wanted = list(combinations(present, 2)) + list(combinations(present, 3))
    for kind in present:
        # Half of these ask for the usual partner, where that is not on the table.
        missing = PARTNERS[kind] if PARTNERS[kind] in expected else str(rng.choice(absent))
        wanted.append((kind, missing))
        wanted.append((kind, str(rng.choice(absent))))
        if len(present) > 1:
            wanted.append((kind, str(rng.choice([k for k in present if k != kind])), missing))
    for kinds in wanted:
        order = [str(kind) for kind in rng.permutation(kinds)]
        texts = [
            f"do you see {joined([a(kind) for kind in order], 'or')}?",
            f"find every {joined(order)}.",
            f"is there any {joined(order, 'or')} here?",
            f"please bring me the {joined([plural(kind) for kind in order])}.",
        ]
        yield Question("list", _wordings("here is", *texts), _of(scene, kinds), tuple(order))
    if len(scene.things) <= MOST_TARGETS:
        texts = ["what is on the table?", "name all the things you see."]
        yield Question("list", _wordings("here is", *texts), tuple(range(len(scene.things))))


def _absent(scene: Scene, rng: np.random.Generator) -> Asked:
    """A question about something that is not there."""
    absent = [kind for kind in KINDS if kind not in scene.counts]
    goals = [goal for goal, kinds in USES.items() if not _of(scene, kinds)]
    if goals and rng.random() < 0.5:
        return Asked("absent", f"what could i use to {rng.choice(goals)}?", "", ())
    kind = str(rng.choice(absent))
    return Asked("absent", [f"where is the {kind}?", f"do you see {a(kind)}?"][int(rng.integers(2))], "", ())
