"""GranD_f (GLaMM), human-annotated part: captions whose phrases carry masks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from popen import masks
from popen.data.images import ImageError, image_size
from popen.data.nouns import head_noun
from popen.data.records import (
    Broken,
    RecordError,
    TreeError,
    annotation_rle,
    image_path,
    load_json,
    take,
    to_rle,
    unusable,
)
from popen.samples import SEG, Region, Rle, Sample

SPLITS = ("train", "val", "test")
QUESTION = "Could you describe the image in detail, with a mask for each thing you mention?"  # ours


def path(split: str) -> str:
    if split == "train":
        return "GranDf/annotations/train/GranDf_HA_GCG_train.json"
    return f"GranDf/annotations/val_test/{split}_gcg_coco_caption_gt.json"


def mask_path(split: str) -> str:
    """Of val and test: the file with the masks of the captions."""
    return path(split).replace("caption_gt", "mask_gt")


def read(root: Path, split: str) -> Iterator[Sample | Broken]:
    """One Sample a caption. Raises TreeError when a file as a whole cannot be used."""
    return _read_train(root) if split == "train" else _read_eval(root, split)


def _read_train(root: Path) -> Iterator[Sample | Broken]:
    file = path("train")
    for index, record in enumerate(load_json(root, file, list)):
        image = ""
        try:
            image = image_path("GranDf/GranDf_HA_images/train", take(record, "file_name", str))
            height, width = image_size(root, image)
            caption = take(record, "caption", str).strip('"').strip()  # as GLaMM's own loader does
            phrases = []
            for phrase, grounding in take(record, "groundings", dict).items():
                span = _span(take(grounding, "token_positives", list), phrase, caption)
                phrases.append((span, phrase, _union(take(grounding, "rle_masks", list), height, width)))
            yield _sample("train", str(index), f"{file}#{index}", image, (height, width), caption, phrases)
        except (RecordError, ImageError) as error:
            yield unusable(file, str(index), error, image)


def _read_eval(root: Path, split: str) -> Iterator[Sample | Broken]:
    """COCO form: captions with labels in one file, masks in another, joined on the image; the n-th
    label of an image belongs to its n-th mask."""
    file, mask_file = path(split), mask_path(split)
    content = load_json(root, mask_file, dict)
    try:
        captions = take(load_json(root, file, dict), "annotations", list)
        images = {str(take(entry, "id", object)): entry for entry in take(content, "images", list)}
        of_image: dict[str, list[Any]] = {}
        for annotation in take(content, "annotations", list):
            of_image.setdefault(str(take(annotation, "image_id", object)), []).append(annotation)
    except RecordError as error:
        raise TreeError(f"{file} or {mask_file}: {error}") from None
    for index, record in enumerate(captions):
        image = ""
        try:
            key = str(take(record, "image_id", object))
            if key not in images:
                raise RecordError(f"{mask_file} has no image {key}")
            entry = images[key]
            # other readers of these files make the name from the id and read the size of the image
            name = take(entry, "file_name", str) if "file_name" in entry else f"{key}.jpg"
            image = image_path("GranDf/GranDf_HA_images/val_test", name)
            if "height" in entry and "width" in entry:
                height, width = take(entry, "height", int), take(entry, "width", int)
            else:
                height, width = image_size(root, image)
            caption, labels = take(record, "caption", str), take(record, "labels", list)
            annotations = of_image.get(key, [])
            if len(labels) != len(annotations):
                raise RecordError(f"{len(labels)} labels but {len(annotations)} masks in {mask_file}")
            spans = find_spans(labels, caption)
            phrases = [
                (span, label, annotation_rle(annotation, height, width))
                for span, label, annotation in zip(spans, labels, annotations, strict=True)
            ]
            yield _sample(split, str(index), f"{file}#{index}", image, (height, width), caption, phrases)
        except (RecordError, ImageError) as error:
            yield unusable(file, str(index), error, image)


def find_spans(labels: Sequence[str], caption: str) -> list[tuple[int, int]]:
    """Where each label stands in the caption: its first place that no other took, whole words and any case.
    Longer labels come first, or "man" would take the place of "man in red"; equals in their order. One that
    has no place of its own there stands behind the caption: its mask is asked for all the same. Raises
    RecordError."""
    if not all(isinstance(label, str) and label.strip() for label in labels):
        raise RecordError("a label is not a text")
    taken: dict[int, tuple[int, int]] = {}
    text = caption.lower()
    for number in sorted(range(len(labels)), key=lambda n: -len(labels[n])):
        label = labels[number]
        start = text.find(label.lower())
        while start >= 0:
            end = start + len(label)
            free = all(end <= first or start >= last for first, last in taken.values())
            if free and _whole_words(text, start, end):
                taken[number] = start, end
                break
            start = text.find(label.lower(), start + 1)
        else:
            taken[number] = len(caption), len(caption)
    return [taken[number] for number in range(len(labels))]


def _whole_words(text: str, start: int, end: int) -> bool:
    return not text[max(0, start - 1) : start].isalnum() and not text[end : end + 1].isalnum()


def _span(positions: list[Any], phrase: str, caption: str) -> tuple[int, int]:
    """Where a phrase stands; its first whole words where the positions are inside of a word, as "man" in
    "woman". Raises RecordError."""
    if len(positions) != 2 or not all(type(position) is int for position in positions):
        raise RecordError(f"the token_positives of {phrase!r} are not [start, end]")
    start, end = positions
    if not 0 <= start < end <= len(caption) or caption[start:end].lower() != phrase.lower():
        raise RecordError(f"the caption has no {phrase!r} at {start}:{end}")
    places = [start] + [found.start() for found in re.finditer(re.escape(phrase), caption, re.IGNORECASE)]
    for place in places:
        if _whole_words(caption, place, place + len(phrase)):
            return place, place + len(phrase)
    raise RecordError(f"the caption has {phrase!r} inside of a word alone")


def _union(rles: list[Any], height: int, width: int) -> Rle:
    """ "12 people" is one phrase with twelve masks, and one target."""
    if not rles:
        raise RecordError("a phrase has no mask")
    parts = [to_rle(rle, height, width) for rle in rles]
    return (
        parts[0] if len(parts) == 1 else masks.encode(np.any([masks.decode(part) for part in parts], axis=0))
    )


def _sample(
    split: str,
    record: str,
    source: str,
    image: str,
    size: tuple[int, int],
    caption: str,
    phrases: list[tuple[tuple[int, int], str, Rle]],
) -> Sample:
    """The caption with {seg} after each grounded phrase, targets in the caption's order."""
    if SEG in caption:
        raise RecordError(f"the caption contains {SEG} already")
    phrases = sorted(phrases, key=lambda entry: entry[0])
    answer, last = "", 0
    for (start, end), _, _ in phrases:
        if start < last:
            raise RecordError("two phrases of the caption overlap")
        answer += f"{caption[last:end]} {SEG}"
        last = end
    targets = tuple(Region(phrase, head_noun(phrase), rle) for _, phrase, rle in phrases)
    return Sample(
        uid=f"grandf/{split}/{record}",
        benchmark="grandf",
        split=split,
        image=image,
        height=size[0],
        width=size[1],
        question=QUESTION,
        answer=answer + caption[last:],
        targets=targets,
        objects=targets,  # what the caption grounds is all that is annotated
        source=source,
    )
