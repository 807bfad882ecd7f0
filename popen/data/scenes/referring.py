"""Expressions that single out one thing, in the manner of RefCOCO, RefCOCO+ and RefCOCOg."""

from __future__ import annotations

import numpy as np

from popen.data.scenes.composition import Scene
from popen.data.scenes.phrases import (
    Thing,
    a,
    colours_differ,
    countable,
    ordinal,
    sideways,
    size_word,
    sizes_differ,
    upright,
)


def by_place(scene: Scene, number: int) -> list[str]:
    """RefCOCO: short, place words allowed."""
    thing, group = _with_twins(scene, number)
    found = by_look(scene, number)
    if sideways(group, scene.size):
        side = "left" if thing is group[0] else "right"
        found += [f"{side} {thing.kind}", f"{thing.kind} on the {side}"]
    if upright(group, scene.size):
        side = "top" if thing.y == min(other.y for other in group) else "bottom"
        found += [f"{side} {thing.kind}", f"{thing.kind} closer to the {side}"]
    if len(group) > 2 and countable(group, scene.size):
        found += [f"{ordinal(thing, group)} {thing.kind} from the left"]
        found += [f"{ordinal(thing, group[::-1])} {thing.kind} from the right"]
    if len(group) == 1:
        third = scene.size / 3
        side = "left" if thing.x < third else "right" if thing.x > 2 * third else "middle"
        found += [f"{thing.kind} {'in' if side == 'middle' else 'on'} the {side}"]
    return found


def by_look(scene: Scene, number: int) -> list[str]:
    """RefCOCO+: no place words; empty where looks alone do not single the thing out."""
    thing, group = _with_twins(scene, number)
    found = []
    if colours_differ(group):
        found += [f"{thing.colour} {thing.kind}", f"{thing.kind} that is {thing.colour}"]
    if sizes_differ(group):
        word = size_word(thing, group)
        found += [
            f"{word} {thing.kind}",
            f"{thing.kind} that is {'larger' if word == 'large' else 'smaller'}",
        ]
    if len(group) == 1:
        found += [thing.kind]
    return found


def in_a_sentence(scene: Scene, number: int) -> list[str]:
    """RefCOCOg: a longer description."""
    thing, group = _with_twins(scene, number)
    short = thing.name.removeprefix("the ")
    if len(group) == 1:
        short = f"{thing.colour} {thing.kind}"
    half = "left" if thing.x < scene.size / 2 else "right"
    found = [f"the {short} that lies on the {half} half of the table"]
    far = sorted(scene.things, key=lambda other: np.hypot(other.x - thing.x, other.y - thing.y))
    neighbour = far[1]
    if scene.counts[neighbour.kind] == 1:
        found += [f"the {short} which is next to the {neighbour.colour} {neighbour.kind}"]
    others = [other for other in scene.counts if other != thing.kind]
    if others:
        found += (
            [f"the {short} on a table with {a(others[-1])} on it"] if scene.counts[others[-1]] == 1 else []
        )
    return found


def _with_twins(scene: Scene, number: int) -> tuple[Thing, list[Thing]]:
    thing = scene.things[number]
    return thing, [scene.things[n] for n in scene.of_kind(thing.kind)]
