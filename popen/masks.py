"""Masks: run-length encoding, polygons and overlap, on top of pycocotools.

A mask is a boolean array (H, W); an `Rle` is COCO's compressed form of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from popen.samples import Rle

Mask = NDArray[np.bool_]


def encode(mask: Mask) -> Rle:
    """Mask (H, W) -> RLE."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(rle: Rle) -> Mask:
    """RLE -> mask (H, W)."""
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode("ascii")}).astype(bool)


def area(rle: Rle) -> int:
    """Pixels set."""
    return int(coco.area({"size": rle["size"], "counts": rle["counts"].encode("ascii")}))


def box(rle: Rle) -> list[int]:
    """Smallest box [left, top, width, height] around the pixels set."""
    return [int(side) for side in coco.toBbox({"size": rle["size"], "counts": rle["counts"].encode("ascii")})]


def union(masks: Sequence[Mask], height: int, width: int) -> Mask:
    """Union of any number of masks (H, W); empty for none."""
    out = np.zeros((height, width), dtype=bool)
    for mask in masks:
        out |= mask
    return out


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union; 1.0 when both are empty (the benchmarks' convention)."""
    joint = np.count_nonzero(a | b)
    return 1.0 if joint == 0 else np.count_nonzero(a & b) / joint


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Rle:
    """COCO polygons [x0, y0, x1, y1, ...] -> RLE of their union. Raises ValueError on none valid."""
    valid = [list(polygon) for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not valid:
        raise ValueError("a segmentation needs at least one polygon of three or more points")
    rle = coco.merge(coco.frPyObjects(valid, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
