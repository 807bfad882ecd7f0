"""Lays a table: which things, where, in what colours. A scene is a function of its seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from popen.data.scenes.drawing import Cutout, Light, cut_out, draw_table, paint, visible, whole
from popen.data.scenes.geometry import moved
from popen.data.scenes.kinds import COLOURS, KINDS, PARTNERS
from popen.data.scenes.phrases import Thing, names
from popen.data.scenes.shapes import Part, Rgb
from popen.masks import Mask

SMALLEST = 30  # visible pixels of a thing in a picture of 64 a side
VISIBLE = 0.45  # least share of a thing that must show

# (sizes of the groups of one kind, weight): most things have a twin, so that a kind's name alone
# does not say which one is meant.
CALM: tuple[tuple[tuple[int, ...], float], ...] = (
    ((2, 1), 8), ((3,), 3), ((1, 1, 1, 1), 6), ((2, 1, 1), 12), ((2, 2), 11), ((3, 1), 8),
    ((2, 2, 1), 20), ((3, 1, 1), 8), ((3, 2), 8), ((2, 2, 2), 6), ((2, 2, 1, 1), 6), ((3, 2, 1), 4),
)  # fmt: skip
CROWDED: tuple[tuple[tuple[int, ...], float], ...] = (
    ((2, 2, 2), 2), ((3, 2, 1), 2), ((3, 3), 2), ((2, 2, 2, 1), 3), ((3, 2, 2), 3), ((3, 2, 1, 1), 2),
    ((4, 2, 1), 1), ((2, 2, 2, 2), 2), ((3, 3, 2), 1),
)  # fmt: skip

TABLES: tuple[tuple[Rgb, tuple[str, ...]], ...] = (
    ((208, 168, 118), ("wood",)),
    ((152, 104, 64), ("wood",)),
    ((98, 64, 44), ("wood",)),
    ((238, 222, 186), ("cloth", "checks", "stripes")),
    ((224, 168, 158), ("cloth", "checks")),
    ((62, 70, 102), ("cloth", "stripes")),
    ((86, 122, 116), ("cloth", "checks", "stone")),
    ((74, 78, 86), ("stone",)),
    ((206, 196, 160), ("stone", "stripes")),
)
CONTRAST = 75.0  # least distance in RGB between a thing and its table


@dataclass(frozen=True)
class Scene:
    """A picture (size x size) and its things, left to right by the centre of what shows of them."""

    picture: Image.Image
    things: tuple[Thing, ...]

    @property
    def size(self) -> int:
        return self.picture.width

    def of_kind(self, kind: str) -> tuple[int, ...]:
        """Numbers of the things of a kind, left to right."""
        return tuple(number for number, thing in enumerate(self.things) if thing.kind == kind)

    @property
    def counts(self) -> Counter[str]:
        return Counter(thing.kind for thing in self.things)


@dataclass(frozen=True)
class _Role:
    """A thing before it has a place."""

    kind: str
    colour: str
    length: float


def compose(seed: Sequence[int], size: int, crowded: bool) -> Scene:
    """Draw the scene of a seed: 3 to 6 things, or 6 to 8 smaller ones when `crowded`."""
    rng = np.random.default_rng(list(seed))
    colour, textures = TABLES[int(rng.integers(len(TABLES)))]
    while True:  # a layout in which a thing is hidden, or two cannot be told apart, is laid anew
        laid = _lay(rng, _cast(rng, colour, crowded), size)
        if laid is None:
            continue
        roles, cutouts, masks = laid
        things = [_thing(role, mask) for role, mask in zip(roles, masks, strict=True)]
        things.sort(key=lambda thing: (thing.x, thing.y))
        named = names(things, size)
        if named is not None:
            table = draw_table(rng, colour, str(rng.choice(textures)), len(cutouts[0].silhouette))
            return Scene(paint(table, cutouts, _light(rng)), tuple(named))


def _thing(role: _Role, mask: Mask) -> Thing:
    y, x = np.nonzero(mask)
    return Thing(role.kind, role.colour, role.length, mask, float(x.mean()), float(y.mean()))


def _light(rng: np.random.Generator) -> Light:
    side, down = rng.uniform(-0.6, 0.6), rng.uniform(-0.65, -0.25)
    deep = np.sqrt(1.0 - side**2 - down**2)
    return Light(side, down, float(deep), rng.uniform(0.25, 0.45), rng.uniform(6.0, 12.0))


def _cast(rng: np.random.Generator, table: Rgb, crowded: bool) -> list[_Role]:
    """Who is on the table: kinds, colours and lengths of the things."""
    patterns = CROWDED if crowded else CALM
    weights = np.array([weight for _, weight in patterns], dtype=float)
    groups = patterns[int(rng.choice(len(patterns), p=weights / weights.sum()))][0]
    scale = 0.82 if crowded else (1.0 if sum(groups) <= 4 else 0.92)
    roles: list[_Role] = []
    chosen: list[str] = []
    for count in rng.permutation(groups):
        kind = _next_kind(rng, chosen, table)
        chosen.append(kind)
        roles += _group(rng, kind, int(count), _contrasting(kind, table), scale)
    return [roles[number] for number in rng.permutation(len(roles))]


def _contrasting(kind: str, table: Rgb) -> list[str]:
    """Colours in which the kind stands out from the table."""
    return [c for c in KINDS[kind].colours if np.linalg.norm(np.subtract(COLOURS[c], table)) >= CONTRAST]


def _next_kind(rng: np.random.Generator, chosen: list[str], table: Rgb) -> str:
    """A kind not on the table yet: often the partner of one that is, or one of its family."""
    free = [kind for kind in KINDS if kind not in chosen and _contrasting(kind, table)]
    draw = rng.random()
    if chosen and draw < 0.3:
        partner = PARTNERS[chosen[-1]]
        if partner in free:
            return partner
    if chosen and draw < 0.6:
        family = [kind for kind in free if KINDS[kind].family == KINDS[chosen[-1]].family]
        if family:
            return str(rng.choice(family))
    return str(rng.choice(free))


def _group(rng: np.random.Generator, kind: str, count: int, colours: list[str], scale: float) -> list[_Role]:
    """Things of one kind that differ in colour, in size (pairs), or in nothing but their place."""
    shortest, longest = KINDS[kind].length
    lengths = rng.uniform(shortest, longest, count) * scale
    draw = rng.random()
    if count > 1 and draw < 0.34 and len(colours) >= count:
        return [
            _Role(kind, str(c), float(n)) for c, n in zip(rng.permutation(colours), lengths, strict=False)
        ]
    colour = str(rng.choice(colours))
    if count == 2 and draw < 0.56:
        middle = (shortest + longest) / 2 * scale
        return [_Role(kind, colour, middle * 0.8), _Role(kind, colour, middle * 1.22)]
    if count > 1:
        lengths = np.full(count, rng.uniform(shortest, longest) * scale) * rng.uniform(0.95, 1.05, count)
    return [_Role(kind, colour, float(length)) for length in lengths]


def _lay(
    rng: np.random.Generator, roles: list[_Role], size: int
) -> tuple[list[_Role], list[Cutout], list[Mask]] | None:
    """Put the things on the table one by one; None when one finds no place or is hidden too much."""
    taken = np.zeros((size, size), dtype=bool)
    cutouts = []
    for role in roles:
        kind = KINDS[role.kind]
        parts = kind.shape(rng, _varied(rng, COLOURS[role.colour]))
        length, turn = role.length * size / 64, rng.uniform(-kind.turn, kind.turn)
        place = _find_place(rng, parts, length, turn, taken, size)
        if place is None:
            return None
        cutouts.append(cut_out(parts, size, length, turn, *place))
        taken |= whole(cutouts[-1], size)
    masks = visible(cutouts, size)
    for cutout, mask in zip(cutouts, masks, strict=True):
        shown = np.count_nonzero(mask)
        if shown < SMALLEST * (size / 64) ** 2 or shown < VISIBLE * np.count_nonzero(whole(cutout, size)):
            return None
    return roles, cutouts, masks


def _varied(rng: np.random.Generator, colour: Rgb) -> Rgb:
    red, green, blue = np.clip(np.array(colour) * rng.uniform(0.9, 1.1) + rng.uniform(-10, 10, 3), 0, 255)
    return float(red), float(green), float(blue)


def _find_place(
    rng: np.random.Generator, parts: list[Part], length: float, turn: float, taken: Mask, size: int
) -> tuple[float, float] | None:
    """A place inside the picture where the thing covers little of the others, or none at all."""
    outlines = [moved(part.points, length, turn, 0, 0) for part in parts if not part.mark]
    every = np.concatenate(outlines)
    low, high = 1.0 - every.min(axis=0), size - 1.0 - every.max(axis=0)
    if (high <= low).any():
        return None
    allowed = 0.22 if rng.random() < 0.3 else 0.0
    for _ in range(30):
        x, y = rng.uniform(low, high)
        canvas = Image.new("L", (size, size))
        for outline in outlines:
            ImageDraw.Draw(canvas).polygon([(px, py) for px, py in outline + np.array([x, y])], fill=1)
        footprint = np.asarray(canvas).astype(bool)
        if np.count_nonzero(footprint & taken) <= allowed * np.count_nonzero(footprint):
            return float(x), float(y)
    return None
