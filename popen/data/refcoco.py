"""RefCOCO, RefCOCO+ (`unc`) and RefCOCOg (`umd`): `refer_seg/<name>/instances.json` and `refs(<by>).p`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from popen.data.names import normal
from popen.data.records import (
    TRAIN2014,
    Broken,
    RecordError,
    TreeError,
    annotation_rle,
    image_path,
    load_json,
    take,
)
from popen.samples import Region, Sample

SPLITS = {
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog": ("train", "val", "test"),
}


def path(name: str) -> str:
    return f"refer_seg/{name}/refs({'umd' if name == 'refcocog' else 'unc'}).p"


def instances(name: str) -> str:
    return f"refer_seg/{name}/instances.json"


class _PlainUnpickler(pickle.Unpickler):
    """Containers and scalars have opcodes of their own; whatever needs a global could run code."""

    file = ""

    def find_class(self, module: str, name: str) -> Any:
        raise TreeError(
            f"{self.file}: names the global {module}.{name}; only plain data is read, do not trust this file"
        )


def load_refs(root: Path, relative: str) -> list[Any]:
    """Unpickle a list of plain data, also one that Python 2 wrote. Raises TreeError, runs no code."""
    with (root / relative).open("rb") as file:
        unpickler = _PlainUnpickler(file, encoding="utf-8")
        unpickler.file = relative
        try:
            refs = unpickler.load()
        except TreeError:
            raise
        except Exception as error:  # a damaged pickle raises almost anything
            raise TreeError(f"{relative} is not a readable pickle ({error}); fetch the file again") from None
    if not isinstance(refs, list):
        raise TreeError(f"{relative} holds a {type(refs).__name__}, a list is expected")
    return refs


def read(root: Path, name: str, split: str) -> Iterator[Sample | Broken]:
    """One Sample a sentence. Raises TreeError when a file as a whole cannot be used."""
    file = path(name)
    try:
        scene = _Instances(root, instances(name))
    except RecordError as error:
        raise TreeError(f"{instances(name)}: {error}") from None
    for index, ref in enumerate(load_refs(root, file)):
        if isinstance(ref, dict) and ref.get("split", split) != split:
            continue
        image = ""
        try:
            take(ref, "split", str)
            key = take(ref, "image_id", int)
            image = scene.path(key)
            height, width, objects = scene.contents(key)
            target = scene.target(take(ref, "ann_id", int), key)
            # all of them first: a record with a broken one is out as a whole
            sents = [take(sentence, "sent", str) for sentence in take(ref, "sentences", list)]
            for number, sent in enumerate(sents):
                yield Sample(
                    uid=f"{name}/{split}/{index}/{number}",
                    benchmark=name,
                    split=split,
                    image=image,
                    height=height,
                    width=width,
                    question=f"Please segment {sent}." if sent.strip() else "",  # ours
                    answer=f"It is the {normal(target.category)} {{seg}}.",
                    targets=(target,),
                    objects=objects,
                    source=f"{file}#{index}/{number}",
                )
        except RecordError as error:
            yield Broken(file, str(index), str(error), image)


def _by_id(content: dict[str, Any], key: str) -> dict[int, Any]:
    entries = take(content, key, list)
    found = {take(entry, "id", int): entry for entry in entries}
    if len(found) != len(entries):
        raise RecordError(f"{len(entries) - len(found)} of the '{key}' have an id that another has too")
    return found


class _Instances:
    """Images, annotations and categories of an `instances.json`, joined by id."""

    def __init__(self, root: Path, file: str) -> None:
        content = load_json(root, file, dict)
        self.images = _by_id(content, "images")
        self.annotations = _by_id(content, "annotations")
        self.categories = {
            key: take(entry, "name", str) for key, entry in _by_id(content, "categories").items()
        }
        self.of_image: dict[int, list[int]] = {}
        for key, entry in self.annotations.items():
            self.of_image.setdefault(take(entry, "image_id", int), []).append(key)
        self.regions: dict[int, Region] = {}

    def path(self, key: int) -> str:
        """The file of an image."""
        if key not in self.images:
            raise RecordError(f"instances.json has no image {key}")
        return image_path(TRAIN2014, take(self.images[key], "file_name", str))

    def contents(self, key: int) -> tuple[int, int, tuple[Region, ...]]:
        """Height and width of an image that is there, and everything annotated in it."""
        entry = self.images[key]
        objects = tuple(self.target(annotation, key) for annotation in self.of_image.get(key, []))
        return take(entry, "height", int), take(entry, "width", int), objects

    def target(self, key: int, image: int) -> Region:
        """One annotation, which must belong to the image."""
        if key not in self.annotations or self.annotations[key]["image_id"] != image:
            raise RecordError(f"instances.json has no annotation {key} of image {image}")
        if key not in self.regions:
            entry, size = self.annotations[key], self.images[image]
            category = take(entry, "category_id", int)
            if category not in self.categories:
                raise RecordError(f"annotation {key} has the unknown category {category}")
            try:
                rle = annotation_rle(entry, take(size, "height", int), take(size, "width", int))
            except RecordError as error:
                raise RecordError(f"annotation {key} in instances.json: {error}") from None
            self.regions[key] = Region(
                f"the {normal(self.categories[category])}", self.categories[category], rle
            )
        return self.regions[key]
