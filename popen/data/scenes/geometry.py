"""Outlines in unit coordinates: x to the right, y down, the thing about one long, centred on 0.

Every function returns points (N, 2) of a closed polygon.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> Points:
    """An ellipse, or the part of one between two angles (degrees, clockwise from the right)."""
    angle = np.radians(np.linspace(start, stop, 36))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def ring(x: float, y: float, rx: float, ry: float, width: float) -> Points:
    """An elliptical ring of the given width; what shows through its hole is not part of the thing."""
    outer, inner = ellipse(x, y, rx, ry), ellipse(x, y, rx - width, ry - width)
    return np.concatenate([outer, inner[::-1]])


def polygon(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=np.float64)


def box(x0: float, y0: float, x1: float, y1: float, corner: float = 0.0) -> Points:
    """A rectangle with rounded corners."""
    if corner == 0.0:
        return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    turns = []
    corners = [(x1 - corner, y1 - corner), (x0 + corner, y1 - corner), (x0 + corner, y0 + corner)]
    for quarter, (cx, cy) in enumerate([*corners, (x1 - corner, y0 + corner)]):
        angle = np.radians(np.linspace(90 * quarter, 90 * quarter + 90, 6))
        turns.append(np.stack([cx + corner * np.cos(angle), cy + corner * np.sin(angle)], axis=1))
    return np.concatenate(turns)


def smooth(*points: tuple[float, float], steps: int = 6) -> Points:
    """A closed Catmull-Rom curve through the points."""
    knots = np.array(points, dtype=np.float64)
    before, after, beyond = (np.roll(knots, -shift, axis=0)[:, None] for shift in (-1, 1, 2))
    here = knots[:, None]
    t = np.linspace(0.0, 1.0, steps, endpoint=False)[None, :, None]
    curve = 0.5 * (
        2 * here
        + (after - before) * t
        + (2 * before - 5 * here + 4 * after - beyond) * t**2
        + (3 * here - before - 3 * after + beyond) * t**3
    )
    return np.asarray(curve).reshape(-1, 2)


def mirrored(*half: tuple[float, float]) -> Points:
    """A smooth outline that is the same on both sides of x = 0, from its right half, top to bottom."""
    return smooth(*half, *[(-x, y) for x, y in reversed(half)])


def stroke(path: Points | Sequence[tuple[float, float]], width: float | NDArray[np.float64]) -> Points:
    """A band along a path; `width` is one number or one a point."""
    path = np.asarray(path, dtype=np.float64)
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    aside = np.stack([-along[:, 1], along[:, 0]], axis=1) * np.broadcast_to(width, len(path))[:, None] / 2
    return np.concatenate([path + aside, (path - aside)[::-1]])


def moved(points: Points, scale: float, degrees: float, x: float, y: float) -> Points:
    """Points scaled, turned clockwise and moved to (x, y)."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[cos, sin], [-sin, cos]]) * scale + (x, y)
