"""How each kind of thing looks: its parts, drawn upright in unit coordinates.

A part is a polygon with a colour. Parts paint in order; a `mark` is paint on the parts before it
and never widens the silhouette. `relief` is how round a part is shaded (0 flat, 1 like a ball).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from popen.data.scenes.geometry import Points, box, ellipse, mirrored, moved, polygon, ring, smooth, stroke

Rgb = tuple[float, float, float]

METAL: Rgb = (186, 192, 200)
DARK: Rgb = (48, 46, 52)
CREAM: Rgb = (240, 232, 212)
LEAF: Rgb = (74, 132, 52)
WOOD: Rgb = (222, 178, 120)
STEM: Rgb = (96, 66, 38)


class Part(NamedTuple):
    points: Points
    colour: Rgb
    relief: float = 1.0
    mark: bool = False


def tint(colour: Rgb, factor: float) -> Rgb:
    """Darker (factor < 1) or lighter (> 1)."""
    red, green, blue = (min(255.0, channel * factor) for channel in colour)
    return red, green, blue


def apple(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    wide, lean = rng.uniform(0.40, 0.45), rng.uniform(-0.04, 0.04)
    body = smooth(
        (0.0, -0.28), (0.2, -0.36), (wide, -0.16), (wide * 0.92, 0.14), (0.2, 0.42), (lean, 0.38),
        (-0.2, 0.42), (-wide * 0.92, 0.14), (-wide, -0.16), (-0.2, -0.36),
    )  # fmt: skip
    parts = [
        Part(body, colour),
        Part(ellipse(0, -0.27, 0.12, 0.05), tint(colour, 0.62), 0, mark=True),
        Part(stroke([(0, -0.26), (0.01, -0.38), (0.06, -0.5)], 0.075), STEM, 0.4),
    ]
    if rng.random() < 0.7:
        parts.append(Part(moved(ellipse(0, 0, 0.16, 0.075), 1, -25, 0.2, -0.42), LEAF, 0.5))
    return parts


def banana(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    reach, thick = rng.uniform(55, 68), rng.uniform(0.22, 0.27)
    angle = np.radians(np.linspace(90 - reach, 90 + reach, 24))
    path = np.stack([0.52 * np.cos(angle), 0.52 * np.sin(angle) - 0.38], axis=1)
    t = np.linspace(0, 1, 24)
    parts = [Part(stroke(path, 0.075 + thick * np.sin(np.pi * t) ** 0.6), colour)]
    ridge = path + np.array([0.0, -0.02])
    parts.append(Part(stroke(ridge[3:-3], 0.02), tint(colour, 0.78), 0, mark=True))
    parts.append(Part(stroke(path[:2], 0.1), STEM, 0.3))
    parts.append(Part(stroke(path[-2:], 0.1), STEM, 0.3))
    for _ in range(int(rng.integers(0, 4))):
        x, y = path[int(rng.integers(5, 19))]
        parts.append(Part(ellipse(x, y + rng.uniform(-0.05, 0.06), 0.03, 0.02), STEM, 0, mark=True))
    return parts


def pear(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    neck, belly = rng.uniform(0.13, 0.17), rng.uniform(0.33, 0.38)
    body = mirrored(
        (0.06, -0.38), (neck, -0.26), (neck + 0.05, -0.06), (belly, 0.2), (0.24, 0.44), (0.05, 0.48)
    )
    return [
        Part(body, colour),
        Part(moved(ellipse(0, 0, 0.1, 0.2), 1, 20, 0.14, 0.2), tint(colour, 0.9), 0, mark=True),
        Part(stroke([(0, -0.34), (-0.02, -0.44), (-0.07, -0.55)], 0.07), STEM, 0.4),
    ]


def lemon(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    tall, tip = rng.uniform(0.28, 0.33), rng.uniform(0.05, 0.08)
    upper = [(0.5, -tip * 0.6), (0.4, -tip - 0.03), (0.22, -tall * 0.86), (0.0, -tall), (-0.22, -tall * 0.86)]
    upper += [(-0.4, -tip - 0.03), (-0.5, -tip * 0.6)]
    parts = [Part(smooth(*upper, *[(x, -y) for x, y in reversed(upper)]), colour)]
    for _ in range(9):
        x, y = rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2)
        parts.append(Part(ellipse(x, y, 0.016, 0.016), tint(colour, 0.8), 0, mark=True))
    return parts


def carrot(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    top = rng.uniform(0.12, 0.15)
    parts = []
    for degrees in (-28, 0, 28):
        leaf = stroke([(0, -0.2), (0, -0.32), (0, -0.46)], np.array([0.05, 0.12, 0.03]))
        parts.append(Part(moved(leaf - (0, -0.22), 1, degrees + rng.uniform(-6, 6), 0, -0.22), LEAF, 0.5))
    body = mirrored((0.05, -0.27), (top, -0.2), (top * 0.8, 0.05), (top * 0.45, 0.32), (0.025, 0.5))
    parts.append(Part(body, colour))
    for y in (-0.1, 0.06, 0.2):
        shift = rng.uniform(-0.05, 0.02)
        parts.append(Part(box(shift, y, shift + 0.1, y + 0.022), tint(colour, 0.72), 0, mark=True))
    return parts


def mushroom(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    tall, stem = rng.uniform(0.42, 0.5), rng.uniform(0.1, 0.14)
    cap = np.concatenate([ellipse(0, 0.02, 0.47, tall, 180, 360), ellipse(0, 0.02, 0.47, 0.1, 0, 180)])
    parts = [
        Part(mirrored((stem, 0.0), (stem * 0.95, 0.25), (stem * 1.35, 0.42), (0.06, 0.48)), CREAM),
        Part(cap, colour),
        Part(ellipse(0, 0.03, 0.4, 0.06), tint(colour, 0.6), 0, mark=True),
    ]
    for x in (-0.24, 0.02, 0.24):
        y = rng.uniform(-0.3, -0.14)
        parts.append(Part(ellipse(x, y, 0.055, 0.045), tint(colour, 1.25), 0, mark=True))
    return parts


def cup(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    side, foot = rng.choice([-1.0, 1.0]), rng.uniform(0.22, 0.29)
    body = np.concatenate(
        [ellipse(-0.06, -0.3, 0.34, 0.1, 180, 360), ellipse(-0.06, 0.32, foot, 0.1, 0, 180)]
    )
    parts = [
        Part(ring(0.25, -0.0, 0.24, 0.23, 0.095), tint(colour, 0.92), 0.8),
        Part(body, colour),
        Part(ellipse(-0.06, -0.3, 0.33, 0.1), tint(colour, 1.2), 0, mark=True),
        Part(ellipse(-0.06, -0.29, 0.27, 0.07), (74, 48, 34), 0, mark=True),
    ]
    style = rng.integers(0, 3)
    if style == 1:
        parts.append(Part(box(-0.5, 0.0, 0.23, 0.1), tint(CREAM, 1.05), 0, mark=True))
    elif style == 2:
        for x in (-0.24, -0.06, 0.12):
            parts.append(Part(ellipse(x, 0.06, 0.05, 0.05), tint(CREAM, 1.05), 0, mark=True))
    return [part._replace(points=part.points * (side, 1.0)) for part in parts]


def bottle(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    wide, neck, shoulder = rng.uniform(0.16, 0.2), rng.uniform(0.06, 0.075), rng.uniform(-0.16, -0.06)
    right = [
        (neck, -0.44),
        (neck, shoulder - 0.12),
        (wide, shoulder + 0.06),
        (wide, 0.44),
        (wide - 0.03, 0.5),
    ]
    body = polygon(*right, *[(-x, y) for x, y in reversed(right)])
    label: Rgb = CREAM if rng.random() < 0.7 else (236, 196, 96)
    return [
        Part(body, colour),
        Part(box(-0.5, 0.1, 0.5, 0.32), label, 0, mark=True),
        Part(box(-0.5, 0.18, 0.02, 0.22), tint(colour, 0.8), 0, mark=True),
        Part(box(-neck - 0.02, -0.52, neck + 0.02, -0.42, 0.02), DARK, 0.5),
    ]


def bowl(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    deep = rng.uniform(0.34, 0.42)
    body = np.concatenate([ellipse(0, -0.1, 0.5, 0.13, 180, 360), ellipse(0, -0.1, 0.5, deep, 0, 180)])
    return [
        Part(box(-0.19, deep - 0.18, 0.19, deep - 0.04, 0.03), tint(colour, 0.75), 0.5),
        Part(body, colour),
        Part(ellipse(0, -0.1, 0.49, 0.125), tint(colour, 1.15), 0, mark=True),
        Part(ellipse(0, -0.09, 0.43, 0.095), tint(colour, 0.58), 0, mark=True),
        Part(stroke(ellipse(0, -0.02, 0.47, 0.2, 15, 165), 0.035), tint(CREAM, 1.03), 0, mark=True),
    ]


def handle(rng: np.random.Generator, colour: Rgb, top: float) -> list[Part]:
    """The lower half of cutlery: a coloured grip with a rounded end."""
    wide = rng.uniform(0.135, 0.155)
    return [Part(box(-wide / 2, top, wide / 2, 0.5, 0.065), colour)]


def fork(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    half = rng.uniform(0.135, 0.155)
    head = [Part(mirrored((half, -0.26), (half * 0.9, -0.13), (0.05, -0.03), (0.045, 0.1)), METAL, 0.5)]
    for x in (-half + 0.035, 0.0, half - 0.035):
        head.append(Part(box(x - 0.036, -0.5, x + 0.036, -0.2, 0.03), METAL, 0.5))
    return head + handle(rng, colour, 0.06)


def knife(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    wide = rng.uniform(0.15, 0.18)
    edge = [(-0.07, 0.1), (-0.07, -0.42), (-0.05, -0.5), (wide - 0.09, -0.36), (wide - 0.07, 0.1)]
    return [
        Part(polygon(*edge), tint(METAL, 1.08), 0.25),
        Part(
            polygon((-0.03, 0.1), (-0.03, -0.4), (-0.005, -0.4), (-0.005, 0.1)),
            tint(METAL, 0.82),
            0,
            mark=True,
        ),
        *handle(rng, colour, 0.06),
    ]


def spoon(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    wide = rng.uniform(0.145, 0.17)
    return [
        Part(stroke([(0, -0.15), (0, 0.0), (0, 0.1)], 0.08), METAL, 0.6),
        Part(ellipse(0, -0.3, wide, 0.2), METAL, 0.5),
        Part(ellipse(0, -0.3, wide * 0.68, 0.145), tint(METAL, 0.72), 0, mark=True),
        Part(ellipse(0.03, -0.26, wide * 0.35, 0.07), tint(METAL, 0.95), 0, mark=True),
        *handle(rng, colour, 0.06),
    ]


def hammer(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    steel = tint(METAL, rng.uniform(0.5, 0.68))
    return [
        Part(box(-0.065, -0.36, 0.065, 0.5, 0.05), colour),
        Part(polygon((0.08, -0.48), (-0.16, -0.48), (-0.34, -0.28), (-0.1, -0.3), (0.08, -0.3)), steel, 0.6),
        Part(box(0.0, -0.49, 0.2, -0.29, 0.02), steel, 0.6),
        Part(box(0.17, -0.51, 0.31, -0.27, 0.02), tint(steel, 1.12), 0.6),
    ]


def scissors(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    open_ = rng.uniform(13, 20)
    parts: list[Part] = []
    for side in (-1.0, 1.0):
        blade = polygon((-0.055, 0.12), (-0.055, -0.3), (0.0, -0.52), (0.055, -0.3), (0.055, 0.12))
        parts.append(Part(moved(blade, 1, side * open_, 0, 0.02), tint(METAL, 1.0 - 0.08 * side), 0.4))
    for side in (-1.0, 1.0):
        parts.append(Part(ring(side * 0.17, 0.32, 0.15, 0.19, 0.085), colour, 0.8))
    parts.append(Part(ellipse(0, 0.05, 0.04, 0.04), DARK, 0, mark=True))
    return parts


def pencil(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    half = rng.uniform(0.068, 0.08)
    return [
        Part(polygon((-half, -0.3), (0, -0.5), (half, -0.3)), WOOD, 0.4),
        Part(polygon((-half * 0.4, -0.42), (0, -0.5), (half * 0.4, -0.42)), DARK, 0, mark=True),
        Part(box(-half, -0.3, half, 0.36), colour, 0.9),
        Part(box(-half, 0.34, half, 0.41), METAL, 0.6),
        Part(box(-half, 0.4, half, 0.5, 0.03), (232, 132, 144), 0.8),
    ]


def ball(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    parts = [Part(ellipse(0, 0, 0.48, 0.48), colour)]
    turn = rng.uniform(0, 180)
    if rng.random() < 0.5:
        stripes = [stroke([(-0.5, shift), (0.0, shift * 1.6), (0.5, shift)], 0.14) for shift in (-0.16, 0.16)]
        parts += [Part(moved(band, 1, turn, 0, 0), tint(CREAM, 1.04), 0, mark=True) for band in stripes]
        return parts
    for start in (0, 120, 240):
        wedge = np.concatenate([[[0.06, -0.06]], ellipse(0, 0, 0.5, 0.5, start + turn, start + turn + 58)])
        parts.append(Part(wedge, tint(CREAM, 1.04), 0, mark=True))
    return parts


def car(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    roof = rng.uniform(-0.3, -0.24)
    side = rng.choice([-1.0, 1.0])
    cabin = [(-0.32, -0.04), (-0.22, roof), (0.12, roof), (0.26, -0.04)]
    glass: Rgb = (176, 212, 232)
    parts = [
        Part(polygon(*cabin), colour, 0.4),
        Part(box(-0.5, -0.08, 0.5, 0.17, 0.07), colour, 0.7),
        Part(
            polygon((-0.26, -0.05), (-0.19, roof + 0.05), (-0.06, roof + 0.05), (-0.06, -0.05)),
            glass,
            0,
            mark=True,
        ),
        Part(
            polygon((0.0, -0.05), (0.0, roof + 0.05), (0.1, roof + 0.05), (0.2, -0.05)), glass, 0, mark=True
        ),
        Part(ellipse(0.46, 0.0, 0.04, 0.04), (252, 232, 150), 0, mark=True),
    ]
    for x in (-0.27, 0.27):
        parts.append(Part(ellipse(x, 0.17, 0.13, 0.13), DARK, 0.5))
        parts.append(Part(ellipse(x, 0.17, 0.055, 0.055), METAL, 0, mark=True))
    return [part._replace(points=part.points * (side, 1.0)) for part in parts]


def phone(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    half = rng.uniform(0.25, 0.29)
    lit: Rgb = (96, 150, 200) if rng.random() < 0.6 else (150, 190, 150)
    parts = [
        Part(box(-half, -0.5, half, 0.5, 0.08), colour, 0.35),
        Part(box(-half + 0.05, -0.4, half - 0.05, 0.36, 0.02), lit, 0, mark=True),
        Part(
            polygon((-half + 0.05, -0.4), (half - 0.1, -0.4), (-half + 0.05, 0.2)),
            tint(lit, 1.2),
            0,
            mark=True,
        ),
        Part(ellipse(0, 0.43, 0.035, 0.035), METAL, 0, mark=True),
    ]
    for row in range(2):
        for column in (-0.12, 0.0, 0.12):
            icon = box(column - 0.04, 0.04 + 0.14 * row, column + 0.04, 0.12 + 0.14 * row)
            parts.append(Part(icon, tuple(rng.uniform(90, 255, 3)), 0, mark=True))
    return parts


def clock(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    parts = []
    for side in (-1.0, 1.0):
        parts.append(
            Part(
                stroke([(side * 0.2, 0.3), (side * 0.26, 0.4), (side * 0.32, 0.5)], 0.1),
                tint(colour, 0.7),
                0.5,
            )
        )
        parts.append(
            Part(moved(ellipse(0, 0, 0.15, 0.1), 1, side * 38, side * 0.25, -0.38), tint(colour, 0.85), 0.8)
        )
    parts.append(Part(ellipse(0, 0.03, 0.42, 0.42), colour, 0.6))
    parts.append(Part(ellipse(0, 0.03, 0.31, 0.31), (250, 248, 240), 0, mark=True))
    for reach, width in ((0.17, 0.06), (0.26, 0.045)):
        hand = stroke([(0, 0), (0, -reach / 2), (0, -reach)], width)
        parts.append(Part(moved(hand, 1, rng.uniform(0, 360), 0, 0.03), DARK, 0, mark=True))
    return parts


def book(rng: np.random.Generator, colour: Rgb) -> list[Part]:
    half = rng.uniform(0.35, 0.4)
    parts = [
        Part(box(-half, -0.46, half + 0.03, 0.5, 0.02), CREAM, 0.2),
        Part(box(-half, -0.5, half, 0.45, 0.02), colour, 0.2),
        Part(box(-half, -0.5, -half + 0.1, 0.45), tint(colour, 0.72), 0, mark=True),
    ]
    if rng.random() < 0.5:
        parts.append(Part(box(-0.16, -0.32, half - 0.08, -0.1), tint(CREAM, 1.02), 0, mark=True))
    else:
        parts.append(Part(ellipse(0.06, 0.08, 0.15, 0.15), (236, 196, 96), 0, mark=True))
        parts.append(Part(box(-0.14, -0.34, half - 0.08, -0.24), (236, 196, 96), 0, mark=True))
    return parts


Shape = Callable[[np.random.Generator, Rgb], list[Part]]
