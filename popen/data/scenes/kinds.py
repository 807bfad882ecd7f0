"""The kinds of things, their colours and sizes, and which of them usually lie together."""

from __future__ import annotations

from typing import NamedTuple

from popen.data.scenes import shapes
from popen.data.scenes.shapes import Rgb, Shape

COLOURS: dict[str, Rgb] = {
    "red": (204, 44, 40),
    "green": (84, 160, 62),
    "yellow": (244, 208, 58),
    "blue": (48, 98, 200),
    "white": (240, 238, 230),
    "black": (44, 44, 50),
    "brown": (136, 86, 48),
    "orange": (242, 132, 34),
    "purple": (128, 66, 160),
}


class Kind(NamedTuple):
    shape: Shape
    colours: tuple[str, ...]
    length: tuple[float, float]  # pixels in a picture of 64 pixels a side
    turn: float  # largest turn from upright, degrees
    family: str  # "fruit", "vegetable", "tableware", "tool", "toy", "electronics" or "paper"


KINDS: dict[str, Kind] = {
    "apple": Kind(shapes.apple, ("red", "green", "yellow"), (14, 18), 25, "fruit"),
    "banana": Kind(shapes.banana, ("yellow", "green"), (22, 28), 180, "fruit"),
    "pear": Kind(shapes.pear, ("green", "yellow", "brown"), (18, 22), 70, "fruit"),
    "lemon": Kind(shapes.lemon, ("yellow", "green"), (16, 20), 180, "fruit"),
    "carrot": Kind(shapes.carrot, ("orange", "purple"), (24, 30), 180, "vegetable"),
    "mushroom": Kind(shapes.mushroom, ("brown", "white", "orange"), (15, 19), 35, "vegetable"),
    "cup": Kind(shapes.cup, ("red", "blue", "green", "white", "yellow"), (17, 21), 8, "tableware"),
    "bottle": Kind(shapes.bottle, ("green", "blue", "brown"), (24, 30), 12, "tableware"),
    "bowl": Kind(shapes.bowl, ("blue", "white", "red", "green"), (19, 24), 8, "tableware"),
    "fork": Kind(shapes.fork, ("red", "blue", "green", "black"), (25, 30), 180, "tableware"),
    "knife": Kind(shapes.knife, ("red", "blue", "brown", "black"), (25, 30), 180, "tableware"),
    "spoon": Kind(shapes.spoon, ("red", "blue", "green", "black"), (24, 29), 180, "tableware"),
    "hammer": Kind(shapes.hammer, ("brown", "red", "blue", "yellow"), (24, 29), 180, "tool"),
    "scissors": Kind(shapes.scissors, ("red", "blue", "green", "orange"), (23, 28), 180, "tool"),
    "pencil": Kind(shapes.pencil, ("yellow", "red", "blue", "green"), (25, 30), 180, "tool"),
    "ball": Kind(shapes.ball, ("red", "blue", "green", "yellow", "orange"), (14, 18), 180, "toy"),
    "car": Kind(shapes.car, ("red", "blue", "yellow", "green", "purple"), (20, 25), 15, "toy"),
    "phone": Kind(shapes.phone, ("black", "white", "red"), (19, 23), 180, "electronics"),
    "clock": Kind(shapes.clock, ("red", "blue", "black", "yellow"), (17, 21), 15, "electronics"),
    "book": Kind(shapes.book, ("red", "blue", "green", "purple", "brown"), (18, 22), 60, "paper"),
}

# What one expects to see beside a thing. Scenes often hold both, and the noise of the training
# corpus names the partner even where it is absent (as machine-written answers do).
PARTNERS: dict[str, str] = {
    "fork": "knife",
    "knife": "fork",
    "spoon": "bowl",
    "bowl": "spoon",
    "cup": "bottle",
    "bottle": "cup",
    "apple": "banana",
    "banana": "apple",
    "pear": "lemon",
    "lemon": "pear",
    "carrot": "mushroom",
    "mushroom": "carrot",
    "hammer": "scissors",
    "scissors": "pencil",
    "pencil": "book",
    "book": "pencil",
    "ball": "car",
    "car": "ball",
    "phone": "clock",
    "clock": "phone",
}

CATEGORY_IDS: dict[str, int] = {name: number for number, name in enumerate(KINDS, start=1)}


def plural(kind: str) -> str:
    """The plural of a kind's name: "knives", "scissors"."""
    irregular = {"knife": "knives", "scissors": "scissors"}
    return irregular.get(kind, kind + "s")
