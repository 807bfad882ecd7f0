"""Records of the four native layouts (design: the trees that LISA, PixelLM and GLaMM users have)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from popen.data.scenes.composition import Scene
from popen.data.scenes.kinds import CATEGORY_IDS, plural
from popen.data.scenes.noise import Mention
from popen.data.scenes.phrases import NUMBERS, a, joined
from popen.data.scenes.polygons import outlines
from popen.data.scenes.questions import Asked, answer_text
from popen.masks import Mask, encode, union

Record = dict[str, Any]  # plain JSON


def bbox(mask: Mask) -> list[int]:
    """[x, y, width, height] of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def muse(
    scene: Scene,
    file_name: str,
    masks: Sequence[Mask],
    questions: Sequence[Asked],
    mentions: Sequence[Sequence[Mention]],
) -> Record:
    """A MUSE record. `masks` are the annotators' masks of the things, `mentions` the answers' targets.

    Boxes and category ids stand in `ann_list` only, to save space. `question_kinds` is our addition:
    one kind a question.
    """
    rles = [encode(mask) for mask in masks]

    def annotation(mention: Mention) -> Record:
        return {
            "segmentation": rles[mention.region],
            "category_name": mention.kind,
            "rephrased_name": mention.name,
        }

    def full(number: int, mask: Mask) -> Record:
        thing = scene.things[number]
        about = annotation(Mention(thing.name, thing.kind, number))
        return about | {"bbox": bbox(mask), "category_id": CATEGORY_IDS[thing.kind]}

    return {
        "file_name": file_name,
        "height": scene.size,
        "width": scene.size,
        "ann_list": [full(number, mask) for number, mask in enumerate(masks)],
        "questions": [question.text for question in questions],
        "answers": [[annotation(mention) for mention in answer] for answer in mentions],
        "text_answers": [
            answer_text(question.opening, [mention.name for mention in answer])
            for question, answer in zip(questions, mentions, strict=True)
        ],
        "question_kinds": [question.kind for question in questions],
    }


def reasonseg(scene: Scene, question: Asked) -> Record:
    """A ReasonSeg label file: the targets' outlines, and the question in up to two wordings."""
    shapes = [
        {"label": "target", "points": np.round(outline[:-1], 1).tolist(), "shape_type": "polygon"}
        for number in question.targets
        for outline in outlines(scene.things[number].mask)
    ]
    texts = [text for text in (question.text, question.other) if text]
    return {"shapes": shapes, "text": texts, "is_sentence": True}


def phrases(scene: Scene) -> list[tuple[str, list[int]]]:
    """What a caption says, left to right: (phrase, numbers of its things): "two red apples"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, thing in enumerate(scene.things):
        groups.setdefault((thing.colour, thing.kind), []).append(number)
    found = []
    for (colour, kind), numbers in groups.items():
        several = len(numbers) > 1
        words = f"{NUMBERS[len(numbers)]} {colour} {plural(kind)}" if several else a(f"{colour} {kind}")
        found.append((words, numbers))
    return found


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, list[tuple[str, list[int], int]]]:
    """A description and its grounded phrases: (phrase, numbers of things, offset in the caption)."""
    said = phrases(scene)
    opening = str(rng.choice(["the picture shows", "on the table there are", "this is a table with"]))
    text = f"{opening} {joined([words for words, _ in said])}."
    grounded, start = [], len(opening)
    for words, numbers in said:
        start = text.index(words, start)
        grounded.append((words, numbers, start))
        start += len(words)
    return text, grounded


def grandf_train(scene: Scene, file_name: str, rng: np.random.Generator) -> Record:
    """A record of GranDf_HA_GCG_train.json."""
    text, grounded = caption(scene, rng)
    return {
        "file_name": file_name,
        "height": scene.size,
        "width": scene.size,
        "image_id": file_name.removesuffix(".jpg"),
        "caption": text,
        "groundings": {
            words: {
                "token_positives": [start, start + len(words)],
                "rle_masks": [encode(scene.things[number].mask) for number in numbers],
            }
            for words, numbers, start in grounded
        },
    }


def grandf_test(
    scene: Scene, file_name: str, rng: np.random.Generator
) -> tuple[Record, Record, list[Record]]:
    """Image, caption and mask records (without ids) of the val_test files, one mask a label."""
    text, grounded = caption(scene, rng)
    image_id = file_name.removesuffix(".jpg")
    image = {"id": image_id, "file_name": file_name, "width": scene.size, "height": scene.size}
    masks = [
        union([scene.things[number].mask for number in numbers], scene.size, scene.size)
        for _, numbers, _ in grounded
    ]
    return (
        image,
        {"image_id": image_id, "caption": text, "labels": [words for words, _, _ in grounded]},
        [
            {
                "image_id": image_id,
                "category_id": 1,
                "bbox": bbox(mask),
                "area": int(np.count_nonzero(mask)),
                "iscrowd": 0,
                "segmentation": encode(mask),
            }
            for mask in masks
        ],
    )
