"""What the four readers share: typed access to foreign records, and masks from any COCO form.

Foreign data is never trusted and never repaired: what does not fit raises `RecordError`, which a
reader turns into a `Broken` that names file, record and rule.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar, cast

import numpy as np
from pycocotools import mask as coco

from popen import masks
from popen.data.images import AbsentImageError, ImageError
from popen.samples import Region, Rle, Sample

T = TypeVar("T")

TRAIN2014 = "refer_seg/images/mscoco/images/train2014"
SLACK = 1.0  # pixels a polygon or box may reach over the edge: annotation tools round outwards


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used, or a question of one. `file` is below the data root."""

    file: str
    record: str  # "7", or "7/2" for its third question; of ReasonSeg the file's stem, or the question
    rule: str
    image: str = field(default="", compare=False)  # as in Sample; empty where the record tells none

    @classmethod
    def of(cls, sample: Sample, rule: str) -> Self:
        """The question of a sample that breaks a rule."""
        file, _, record = sample.source.rpartition("#")
        return cls(file, record, rule, sample.image)

    @property
    def source(self) -> str:
        """As in Sample."""
        return f"{self.file}#{self.record}"

    def __str__(self) -> str:
        return f"{self.file}, record {self.record}: {self.rule}"


class Absent(Broken):
    """A record whose image is not there."""


class RecordError(ValueError):
    """One record breaks a rule; the message is the rule."""


class TreeError(ValueError):
    """A whole file cannot be used; the message names it."""


def load_json(root: Path, relative: str, kind: type[T]) -> T:
    """Content of a UTF-8 JSON file whose top level is a `kind`. Raises TreeError."""
    try:
        content = json.loads((root / relative).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TreeError(f"there is no {relative} below {root}; fetch the data set whole") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TreeError(f"{relative} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(content, kind):
        raise TreeError(f"{relative} holds a {type(content).__name__}, a {kind.__name__} is expected")
    return content


def unusable(file: str, record: str, error: RecordError | ImageError, image: str) -> Broken:
    """The record that `error` tells about."""
    kind = Absent if isinstance(error, AbsentImageError) else Broken
    return kind(file, record, str(error), image)


def whole(source: str) -> str:
    """The record that a source is a part of: "<file>#7" of "<file>#7/2", its third question; of ReasonSeg
    the file."""
    file, _, record = source.rpartition("#")
    return file if file.startswith("reason_seg/") else f"{file}#{record.partition('/')[0]}"


def writable(text: str, what: str) -> str:
    """`text`, which a UTF-8 file or a path must be able to hold. JSON can spell what neither can.

    Raises RecordError.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RecordError(f"{what} has half a character, {half}; write it again as UTF-8") from None
    if "\0" in text:
        raise RecordError(f"{what} has a null character; take it out")
    return text


def take(record: object, key: str, kind: type[T]) -> T:
    """`record[key]`, which must exist and be a `kind`. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError(f"is a {type(record).__name__}, not an object with the key '{key}'")
    if key not in record:
        raise RecordError(f"the key '{key}' is missing")
    value = record[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecordError(f"the key '{key}' is a {type(value).__name__}, not a {kind.__name__}")
    if isinstance(value, str):
        writable(value, f"the key '{key}'")
    return value


def image_path(folder: str, name: str) -> str:
    """`folder/name` as a path below the data root. Raises RecordError when `name` climbs out of it."""
    path = PurePosixPath(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise RecordError(f"the image path {name!r} leaves its folder")
    return f"{folder}/{path}"


def run_lengths(counts: str) -> list[int]:
    """Run lengths of COCO's compressed form (groups of 5 bits, deltas against the run before last).

    pycocotools reads past the end of a damaged string, so this is checked here first.
    Raises RecordError.
    """
    bits = np.frombuffer(counts.encode("ascii", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if bits.size == 0 or bits.min() < 0 or bits.max() > 63 or bits[-1] & 0x20:
        raise RecordError("the RLE string is damaged")
    ends = np.flatnonzero((bits & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise RecordError("the RLE string is damaged")
    place = np.arange(bits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((bits & 0x1F) << (5 * place), starts)
    values -= np.where(bits[ends] & 0x10, np.int64(1) << (5 * lengths), 0)  # the sign bit
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return cast(list[int], values.tolist())


def _from_rle(segmentation: dict[str, Any], height: int, width: int) -> Rle:
    size = take(segmentation, "size", list)
    if size != [height, width]:
        raise RecordError(f"the mask's size {size} is not the image's [{height}, {width}]")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        lengths: list[int] = run_lengths(counts)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        lengths = counts
    else:
        raise RecordError("the RLE's counts are neither a string nor a list of whole numbers")
    if any(run < 0 for run in lengths) or sum(lengths) != height * width:
        raise RecordError(f"the RLE's runs do not add up to {height} x {width} pixels")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts}
    packed = coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    return {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def _check_polygon(polygon: object, height: int, width: int) -> None:
    numbers = isinstance(polygon, list) and all(type(value) in (int, float) for value in polygon)
    if not numbers or len(cast(list[float], polygon)) < 6 or len(cast(list[float], polygon)) % 2:
        raise RecordError("a polygon is not a list of x, y pairs of three or more points")
    points = np.asarray(polygon, dtype=float).reshape(-1, 2)
    if not (np.isfinite(points).all() and points.min() >= -SLACK):
        raise RecordError("a polygon leaves the image")
    if points[:, 0].max() > width + SLACK or points[:, 1].max() > height + SLACK:
        raise RecordError(f"a polygon leaves the image of {width} x {height} pixels")


def to_rle(segmentation: object, height: int, width: int) -> Rle:
    """Polygons, uncompressed or compressed RLE -> RLE of the image's size. Raises RecordError."""
    if height <= 0 or width <= 0:
        raise RecordError(f"the image's size {height} x {width} is not positive")
    if isinstance(segmentation, dict):
        return _from_rle(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise RecordError("a segmentation is neither RLE nor a list of polygons")
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    return masks.from_polygons(segmentation, height, width)


def annotation_rle(annotation: object, height: int, width: int) -> Rle:
    """The mask of a COCO annotation; its box, where there is one, must lie inside the image."""
    rle = to_rle(take(annotation, "segmentation", object), height, width)
    box = cast(dict[str, Any], annotation).get("bbox")
    if box is not None:
        if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):
            raise RecordError("the box is not a list of x, y, width, height")
        x, y, w, h = box
        inside = x >= -SLACK and y >= -SLACK and x + w <= width + SLACK and y + h <= height + SLACK
        if not inside or w < 0 or h < 0:
            raise RecordError(f"the box {box} leaves the image of {width} x {height} pixels")
    return rle


def list_answer(targets: Sequence[Region]) -> str:
    """Ours: "It is the cup {seg}, the fork {seg} and the knife {seg}."; a sentence without masks for none."""
    names = [f"{target.name} {{seg}}" for target in targets]
    if not names:
        return "There is no such thing in this image."
    head = ", ".join(names[:-1])
    return f"It is {head} and {names[-1]}." if head else f"It is {names[-1]}."
