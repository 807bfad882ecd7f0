"""MUSE (PixelLM): `muse/muse_<split>.json`, images of COCO train2014, train2017 and val2017."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from popen.data.names import normal
from popen.data.records import (
    TRAIN2014,
    Broken,
    RecordError,
    annotation_rle,
    image_path,
    list_answer,
    load_json,
    take,
    writable,
)
from popen.samples import SEG, Region, Sample

SPLITS = ("train", "val", "test_less", "test_many", "preference")  # the last is ours: the clean scenes


def path(split: str) -> str:
    return f"muse/muse_{split}.json"


def read(root: Path, split: str) -> Iterator[Sample | Broken]:
    """One Sample a question. Raises TreeError when the file as a whole is no list of records."""
    file = path(split)
    for index, record in enumerate(load_json(root, file, list)):
        image = ""
        try:
            image = _image(record)
            height, width, objects, questions, answers = _parts(record)
        except RecordError as error:
            yield Broken(file, str(index), str(error), image)
            continue
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            try:
                targets = _regions(answer, height, width)
                yield Sample(
                    uid=f"muse/{split}/{index}/{number}",
                    benchmark="muse",
                    split=split,
                    image=image,
                    height=height,
                    width=width,
                    question=_text(question, "question"),
                    answer=_answer(record, number, targets),
                    targets=targets,
                    objects=objects,
                    kind=_entry(record, "question_kinds", number) or "",
                    source=f"{file}#{index}/{number}",
                )
            except RecordError as error:
                yield Broken(file, f"{index}/{number}", str(error), image)


def _parts(record: dict[str, Any]) -> tuple[int, int, tuple[Region, ...], list[object], list[object]]:
    """Height, width, objects, questions, answers of a record."""
    height, width = take(record, "height", int), take(record, "width", int)
    questions, answers = take(record, "questions", list), take(record, "answers", list)
    if len(questions) != len(answers):
        raise RecordError(f"{len(questions)} questions but {len(answers)} answers")
    return height, width, _regions(record.get("ann_list"), height, width), questions, answers


def _image(record: object) -> str:
    """`coco_url` names folder and file (train2017/x.jpg); a bare `file_name` is of train2014, as it is beside
    one of COCO's old addresses, which name neither (http://mscoco.org/images/98304)."""
    if isinstance(record, dict) and record.get("coco_url"):
        url = take(record, "coco_url", str).split("/")
        if len(url) > 1 and url[-2] in ("train2014", "train2017", "val2017"):
            return image_path(f"{TRAIN2014.rsplit('/', 1)[0]}/{url[-2]}", url[-1])
        if not record.get("file_name"):
            raise RecordError(
                f"the key 'coco_url' does not end in a COCO folder and file: {record['coco_url']!r}"
            )
    return image_path(TRAIN2014, take(record, "file_name", str))


def _regions(annotations: object, height: int, width: int) -> tuple[Region, ...]:
    if not isinstance(annotations, list):
        raise RecordError(f"annotations are a {type(annotations).__name__}, not a list")
    regions = []
    for annotation in annotations:
        rle = annotation_rle(annotation, height, width)
        category = take(annotation, "category_name", str)
        if not normal(category):
            raise RecordError(f"the category of an annotation is blank ({category!r})")
        name = take(annotation, "rephrased_name", str) if annotation.get("rephrased_name") else ""
        regions.append(Region(name or f"the {normal(category)}", category, rle))
    return tuple(regions)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"the {what} is a {type(value).__name__}, not a text")
    return writable(value, f"the {what}")


def _entry(record: dict[str, Any], key: str, number: int) -> str | None:
    """Entry of an optional list that runs beside the questions; None where it is not given."""
    if record.get(key) is None:
        return None
    entries = take(record, key, list)
    if len(entries) != len(record["questions"]):
        raise RecordError(f"{len(record['questions'])} questions but {len(entries)} in '{key}'")
    return None if entries[number] is None else _text(entries[number], f"entry in '{key}'")


def _answer(record: dict[str, Any], number: int, targets: tuple[Region, ...]) -> str:
    answer = _entry(record, "text_answers", number)
    if answer is None:
        return list_answer(targets)
    if answer.count(SEG) != len(targets):
        raise RecordError(
            f"the text answer has {answer.count(SEG)} {SEG} but there are {len(targets)} targets"
        )
    return answer
