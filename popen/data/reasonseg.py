"""ReasonSeg (LISA): `reason_seg/ReasonSeg/<split>/X.jpg` with `X.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from popen import masks
from popen.data.images import AbsentImageError, ImageError, image_size
from popen.data.records import (
    Broken,
    RecordError,
    TreeError,
    load_json,
    take,
    to_rle,
    unusable,
    writable,
)
from popen.samples import SEG, Region, Rle, Sample

SPLITS = ("train", "val", "test")
EXPLANATORY = "reason_seg/ReasonSeg/explanatory/train.json"


def path(split: str) -> str:
    return f"reason_seg/ReasonSeg/{split}"


def read(root: Path, split: str) -> Iterator[Sample | Broken]:
    """Training yields one Sample a text, evaluation asks the first text only (LISA's convention).

    The answer is "It is {seg}."; where `explanatory/train.json` has an explanation of the very
    question, it follows as a second sentence.
    """
    explained = _explanations(root) if split == "train" else {}
    for annotation in sorted((root / path(split)).glob("*.json")):
        name = annotation.name.encode("utf-8", "backslashreplace").decode()  # a file's name can be any bytes
        file, stem, image = f"{path(split)}/{name}", name.removesuffix(".json"), ""
        try:
            if name != annotation.name:
                raise RecordError("the file's name is not UTF-8; rename it and its image")
            image = _image(annotation, path(split))
            height, width = image_size(root, image)
            record = _load(annotation)
            target, ignore = paint(take(record, "shapes", list), height, width)
            texts = take(record, "text", list)
            sentence = take(record, "is_sentence", bool)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise RecordError("the key 'text' is not a list of one or more texts")
            for text in texts:
                writable(text, "the key 'text'")
        except (RecordError, ImageError) as error:
            yield unusable(file, stem, error, image)
            continue
        for number, text in enumerate(texts if split == "train" else texts[:1]):
            explanation = explained.get((stem, text), "")
            if SEG in explanation:
                yield Broken(file, str(number), f"'outputs' in {EXPLANATORY} must not contain {SEG}", image)
                continue
            yield Sample(
                uid=f"reasonseg/{split}/{stem}/{number}",
                benchmark="reasonseg",
                split=split,
                image=image,
                height=height,
                width=width,
                question=text if sentence or not text.strip() else f"Please segment {text}.",  # phrases: ours
                answer=f"It is {SEG}. {explanation}".strip(),
                targets=(Region("", "", target),),  # the data set names neither thing nor kind
                ignore=ignore,
                source=f"{file}#{number}",
            )


def paint(shapes: list[Any], height: int, width: int) -> tuple[Rle, Rle | None]:
    """Target and ignore region of LabelMe shapes. Largest first, so that a small shape on top of a
    large one wins, whichever of the two kinds it is; "flag" is no region. Raises RecordError."""
    painted = []
    for shape in shapes:
        label = take(shape, "label", str).lower()
        if label == "flag":
            continue
        points = take(shape, "points", list)
        if not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise RecordError("the points of a shape are not x, y pairs")
        rle = to_rle([[value for point in points for value in point]], height, width)
        painted.append((masks.area(rle), 255 if "ignore" in label else 1, masks.decode(rle)))
    canvas = np.zeros((height, width), dtype=np.uint8)
    for _, value, mask in sorted(painted, key=lambda entry: -entry[0]):
        canvas[mask] = value
    ignored = canvas == 255
    return masks.encode(canvas == 1), masks.encode(ignored) if ignored.any() else None


def _image(annotation: Path, folder: str) -> str:
    """The image beside an annotation; the public set has .jpg only, scenes are .png."""
    for suffix in (".jpg", ".png"):
        if annotation.with_suffix(suffix).is_file():
            return f"{folder}/{annotation.stem}{suffix}"
    raise AbsentImageError(f"there is no {annotation.stem}.jpg or .png beside it")


def _load(annotation: Path) -> Any:
    try:
        raw = annotation.read_bytes()
    except OSError as error:  # a link to nowhere, a folder of that name
        raise RecordError(f"cannot be read ({error.strerror}); fetch it again") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")  # some of the public files were written on Windows
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"is not valid JSON ({error})") from None


def _explanations(root: Path) -> dict[tuple[str, str], str]:
    """(image stem, question) -> explanation."""
    if not (root / EXPLANATORY).exists():
        return {}
    try:
        return {
            (Path(take(entry, "image", str)).stem, take(entry, "query", str)): take(entry, "outputs", str)
            for entry in load_json(root, EXPLANATORY, list)
        }
    except RecordError as error:
        raise TreeError(f"{EXPLANATORY}: an entry: {error}") from None
