"""Spoils the large training corpus the way machine-written answers and coarse polygons are spoiled.

The recipe is ours; its shares are `scenes.noise` in the parameters, and zero leaves the corpus clean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion

from popen.data.scenes.composition import Scene
from popen.data.scenes.kinds import KINDS, PARTNERS
from popen.data.scenes.polygons import outlines
from popen.data.scenes.questions import Asked
from popen.masks import Mask
from popen.params import NoiseParams


@dataclass(frozen=True)
class Mention:
    """A target as an answer names it: words, kind and the number of the thing whose region it shows."""

    name: str
    kind: str
    region: int


def truth(scene: Scene, question: Asked) -> list[Mention]:
    """The right answer's mentions, in the order in which it tells them."""
    return _in_order(_mentions(scene, question), question)


def _mentions(scene: Scene, question: Asked) -> list[Mention]:
    """Left to right."""
    things = scene.things
    return [Mention(things[n].name, things[n].kind, n) for n in question.targets]


def _in_order(mentions: list[Mention], question: Asked) -> list[Mention]:
    """Kind by kind: those that the question names as it names them, others as the table of kinds has them.

    Within a kind the top one and the large one come first, else it goes from left to right.
    """
    kinds = [*question.named, *KINDS]

    def place(mention: Mention) -> tuple[int, bool, int]:
        second = mention.name.startswith(("the bottom ", "the small "))
        return kinds.index(mention.kind), second, mention.region

    return sorted(mentions, key=place)


def noisy(scene: Scene, question: Asked, rng: np.random.Generator, noise: NoiseParams) -> list[Mention]:
    """The mentions of a machine-written answer: a plausible absent thing named, or a small one left out."""
    mentions = _mentions(scene, question)
    invent, drop = rng.random(2)
    if question.kind in ("list", "use") and invent < noise.absent_mentioned:
        for mention in mentions:
            partner = PARTNERS[mention.kind]
            if partner not in scene.counts:
                absent = Mention(f"the {partner}", partner, mention.region)
                return _in_order([*mentions, absent], question)
    if len(mentions) > 1 and drop < noise.present_dropped:
        smallest = min(mentions, key=lambda mention: np.count_nonzero(scene.things[mention.region].mask))
        mentions.remove(smallest)
    return _in_order(mentions, question)


def coarse(mask: Mask, rng: np.random.Generator) -> Mask:
    """A carelessly drawn version of a mask (H, W): thicker, thinner, five-cornered or shifted.

    Distances are 2 to 3 pixels of a picture of 64; it is never empty.
    """
    unit = len(mask) / 64
    reach = max(1, round(2 * unit))
    spoiled = mask
    match int(rng.integers(4)):
        case 0:
            spoiled = binary_dilation(mask, iterations=reach)
        case 1:
            spoiled = binary_erosion(mask, iterations=reach)
        case 2:
            spoiled = _five_corners(mask, rng)
        case 3:
            shift = rng.choice([-3, -2, 2, 3], size=2) * unit
            spoiled = _shifted(mask, round(shift[0]), round(shift[1]))
    if np.count_nonzero(spoiled) < 0.3 * np.count_nonzero(mask):
        spoiled = binary_dilation(mask, iterations=reach)
    return np.asarray(spoiled, dtype=bool)


def _five_corners(mask: Mask, rng: np.random.Generator) -> Mask:
    outline = max(outlines(mask), key=len)
    corners = (np.arange(5) / 5 + rng.random() / 5) * len(outline)
    canvas = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in outline[corners.astype(int)] - 0.5], fill=1)
    return np.asarray(canvas).astype(bool)


def _shifted(mask: Mask, down: int, right: int) -> Mask:
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    rows, columns = rows + down, columns + right
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    shifted = np.zeros_like(mask)
    shifted[rows[inside], columns[inside]] = True
    return shifted
