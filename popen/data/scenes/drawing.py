"""Paints things on a table and finds what is visible of each.

Everything is painted at four times the size and averaged down. A pixel belongs to a thing when
more than half of it shows that thing, so the masks of a picture never overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt, gaussian_filter

from popen.data.scenes.geometry import moved
from popen.data.scenes.shapes import Part, Rgb
from popen.masks import Mask

SUPER = 4  # subpixels a pixel and side

Picture = NDArray[np.float32]  # (H, W, 3), 0 to 255


@dataclass(frozen=True)
class Cutout:
    """A thing in its place on the enlarged canvas: its parts (in order) and its silhouette."""

    parts: tuple[tuple[Part, Mask], ...]
    silhouette: Mask  # (SUPER x size, SUPER x size)


@dataclass(frozen=True)
class Light:
    x: float  # unit vector towards the light; y points down, z at the viewer
    y: float
    z: float
    shadow: float  # how dark shadows are, 0 to 1
    reach: float  # how far they fall, subpixels


def cut_out(parts: list[Part], size: int, length: float, degrees: float, x: float, y: float) -> Cutout:
    """Place a shape. `length`, `x` and `y` are pixels of the final picture of `size` a side."""
    side = size * SUPER
    silhouette = np.zeros((side, side), dtype=bool)
    placed = []
    for part in parts:
        points = moved(part.points, length * SUPER, degrees, x * SUPER, y * SUPER)
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).polygon([(px, py) for px, py in points], fill=1)
        mask = np.asarray(canvas).astype(bool)
        if part.mark:
            mask &= silhouette
        else:
            silhouette |= mask
        placed.append((part, mask))
    return Cutout(tuple(placed), silhouette)


def visible(cutouts: list[Cutout], size: int) -> list[Mask]:
    """What shows of each thing (H, W) when they are painted in order, later ones on top."""
    covered = np.zeros_like(cutouts[0].silhouette)
    masks = []
    for cutout in reversed(cutouts):
        masks.append(_mostly(cutout.silhouette & ~covered, size))
        covered |= cutout.silhouette
    return masks[::-1]


def whole(cutout: Cutout, size: int) -> Mask:
    """The thing's mask if nothing lay on it."""
    return _mostly(cutout.silhouette, size)


def _mostly(mask: Mask, size: int) -> Mask:
    """Pixels of which more than half of the subpixels are set."""
    rows = mask.view(np.uint8).reshape(size, SUPER, -1).sum(axis=1, dtype=np.uint8)
    return np.asarray(rows.reshape(size, size, SUPER).sum(axis=2) > SUPER**2 / 2)


def paint(table: Picture, cutouts: list[Cutout], light: Light) -> Image.Image:
    """The picture of the things on the table (SUPER x size a side), averaged down to `size`."""
    canvas = table.copy()
    side = len(canvas)
    for cutout in cutouts:
        _cast_shadow(canvas, cutout.silhouette, light)
        for part, mask in cutout.parts:
            _paint_part(canvas, part, mask, light)
    falloff = np.linspace(-1, 1, side, dtype=np.float32)
    canvas *= (1.0 + 0.07 * (light.x * falloff[None, :] + light.y * falloff[:, None]))[..., None]
    size = side // SUPER
    small = canvas.reshape(size, SUPER, size, SUPER, 3).mean(axis=(1, 3))
    return Image.fromarray(np.clip(np.rint(small), 0, 255).astype(np.uint8))


def _window(mask: Mask, margin: int) -> tuple[slice, slice] | None:
    """The part of the canvas around what is set in the mask; None when nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    return (
        slice(max(0, rows[0] - margin), rows[-1] + margin + 1),
        slice(max(0, columns[0] - margin), columns[-1] + margin + 1),
    )


def _cast_shadow(canvas: Picture, silhouette: Mask, light: Light) -> None:
    window = _window(silhouette, 22)
    if window is None:
        return
    shape = silhouette[window].astype(np.float32)
    shift = (round(-light.y * light.reach), round(-light.x * light.reach))
    shade = gaussian_filter(np.roll(shape, shift, axis=(0, 1)), 4.0) + 0.6 * gaussian_filter(shape, 5.0)
    canvas[window] *= 1.0 - light.shadow * np.minimum(shade, 1.0)[..., None]


def _paint_part(canvas: Picture, part: Part, mask: Mask, light: Light) -> None:
    window = _window(mask, 2)
    if window is None:
        return
    inside = mask[window]
    colour = np.array(part.colour, dtype=np.float32)
    if part.relief == 0.0:
        below = canvas[window][inside]
        # A mark keeps the light of what it is painted on.
        level = below.mean(axis=1) / max(1.0, float(below.mean()))
        canvas[window][inside] = colour * np.clip(level, 0.6, 1.25)[:, None]
        return
    depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    radius = max(4.0, float(depth.max()))
    along = np.minimum(depth / radius, 1.0)
    height = gaussian_filter(np.sqrt(along * (2.0 - along)), 1.5) * radius * part.relief
    slope_y, slope_x = np.gradient(height)
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1.0)
    facing = (-slope_x * light.x - slope_y * light.y + light.z) / norm
    shine = np.clip((facing - 0.93) / 0.07, 0.0, 1.0) ** 2 * 0.3 * part.relief
    tone = (0.5 + 0.6 * np.clip(facing, 0.0, 1.0)) * np.where(depth < 2.0, 0.8, 1.0)
    shaded = colour * tone[..., None]
    shaded += (255.0 - shaded) * shine[..., None]
    canvas[window][inside] = shaded[inside]


def draw_table(rng: np.random.Generator, colour: Rgb, texture: str, side: int) -> Picture:
    """An empty table (side, side, 3): "wood", "cloth", "checks", "stripes" or "stone"."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    turn = rng.uniform(0, np.pi)
    u = np.cos(turn) * x + np.sin(turn) * y
    v = -np.sin(turn) * x + np.cos(turn) * y
    if texture == "wood":
        wave = np.sin(
            2 * np.pi * (rng.uniform(5, 8) * u + 0.35 * np.sin(rng.uniform(3, 6) * v + rng.uniform(0, 6)))
        )
        gap = (np.mod(u * rng.uniform(2.5, 3.5) + rng.uniform(), 1.0) < 0.022).astype(np.float32)
        level = 1.0 + 0.035 * wave - 0.22 * gap
    elif texture == "checks":
        count = rng.uniform(3.0, 5.0)
        level = 1.0 + 0.05 * (np.sign(np.sin(2 * np.pi * count * u)) + np.sign(np.sin(2 * np.pi * count * v)))
    elif texture == "stripes":
        level = 1.0 + 0.06 * np.sign(np.sin(2 * np.pi * rng.uniform(3.0, 6.0) * u))
    elif texture == "stone":
        grain = gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), 5.0, mode="wrap")
        level = 1.0 + 0.045 * grain / grain.std()
    else:
        level = 1.0 + 0.02 * np.sin(2 * np.pi * 9 * u) * np.sin(2 * np.pi * 9 * v)
    return np.asarray(np.array(colour, dtype=np.float32) * np.asarray(level)[..., None], dtype=np.float32)
