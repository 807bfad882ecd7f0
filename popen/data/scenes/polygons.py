"""Outlines of a mask, for the layouts that store polygons."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import contourpy
import numpy as np

from popen.data.scenes.geometry import Points
from popen.masks import Mask


def outlines(mask: Mask) -> list[Points]:
    """One closed polygon (N, 2) of x, y a connected part of the mask (H, W).

    Coordinates are COCO's: pixel (row, column) covers [column, column + 1] x [row, row + 1]. A hole
    is joined to its outline by a seam, so that one polygon is the whole part.
    """
    padded = np.pad(mask, 1).astype(float)
    lines = contourpy.contour_generator(z=padded, fill_type=contourpy.FillType.OuterOffset)
    polygons, offsets = cast(tuple[list[Points], list[list[int]]], lines.filled(0.5, np.inf))
    joined = []
    for points, starts in zip(polygons, offsets, strict=True):
        rings = [points[a:b] for a, b in pairwise(starts)]
        outline = rings[0]
        for hole in rings[1:]:
            gaps = np.linalg.norm(outline[:, None] - hole[None], axis=2)
            near, start = np.unravel_index(int(gaps.argmin()), gaps.shape)
            turned = np.concatenate([hole[start:-1], hole[: start + 1]])
            outline = np.concatenate([outline[: near + 1], turned, outline[near:]])
        joined.append(outline - 0.5)  # one off for the padding, half on for the pixel's centre
    return joined
