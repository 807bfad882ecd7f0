"""Writes the scenes as one tree in the four native layouts.

Every scene is drawn from its own seed, [seed, split, number], by whichever process is free: the tree
is the same for any number of processors.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from popen.data.scenes import records
from popen.data.scenes.composition import Scene, compose
from popen.data.scenes.facts import EDIBLE
from popen.data.scenes.kinds import CATEGORY_IDS, KINDS
from popen.data.scenes.noise import coarse, noisy, truth
from popen.data.scenes.questions import MOST_TARGETS, Asked, answer_text, ask
from popen.data.scenes.records import Record
from popen.data.scenes.referring import by_look, by_place, in_a_sentence
from popen.masks import Mask, encode
from popen.params import ScenesParams

IMAGES = "refer_seg/images/mscoco/images/train2014"
REASON_KINDS = ("use", "nutrition", "danger", "material")
REASON_IMAGES = {"train": 150, "val": 60, "test": 200}
GRAND_IMAGES = {"train": 300, "val": 60, "test": 150}

LEARNT = ("train", "preference", "val")

# A split's number is part of its scenes' seeds: never renumber one.
SPLITS = {
    name: number
    for number, name in enumerate(
        ["train", "preference", "val", "test_less", "test_many", "reason_train", "reason_val", "reason_test",
         "grand_train", "grand_val", "grand_test"]
    )
}  # fmt: skip


class Reference(NamedTuple):
    """One referring expression set, before it has ids."""

    dataset: str  # folder: "refcoco", "refcoco+", "refcocog"
    split: str
    thing: int
    sentences: list[str]


class Drawn(NamedTuple):
    """What a worker gives back for a scene: `instances` are (kind, bbox, area, RLE), one a thing."""

    record: Record
    references: list[Reference]
    instances: list[tuple[str, list[int], int, Any]]


def write_tree(root: Path, params: ScenesParams, progress: bool = True) -> None:
    """Write the whole tree below `root` (made when missing; files already there are overwritten)."""
    (root / IMAGES).mkdir(parents=True, exist_ok=True)
    (root / "muse").mkdir(exist_ok=True)
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:

        def run(job: Callable[[int], Any], count: int, name: str) -> list[Any]:
            drawn = pool.imap(job, range(count), chunksize=8)
            return list(tqdm(drawn, total=count, desc=f"scenes {name}", disable=not progress, unit="image"))

        sizes = {"train": params.train, "preference": params.preference, "val": params.val}
        sizes |= {"test_less": params.test, "test_many": params.test}
        everything: list[tuple[str, int, Drawn]] = []
        for split, count in sizes.items():
            drawn = run(partial(_draw_muse, root, params, split), count, split)
            _write_json(root / f"muse/muse_{split}.json", [one.record for one in drawn])
            everything += [(split, number, one) for number, one in enumerate(drawn)]
        for dataset, name in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
            _write_references(root / "refer_seg" / dataset, name, dataset, everything, params.size)
        _write_reasonseg(root / "reason_seg/ReasonSeg", params, run)
        _write_grandf(root / "GranDf", params, run)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, "JPEG", quality=85, subsampling=0, optimize=True)


def _coco_name(split: str, number: int) -> str:
    return f"COCO_train2014_{_image_id(split, number):012d}.jpg"


def _image_id(split: str, number: int) -> int:
    return SPLITS[split] * 100_000 + number + 1


def _generators(
    params: ScenesParams, split: str, number: int
) -> tuple[np.random.Generator, np.random.Generator]:
    """Generators of a scene's words and of its noise, apart from its picture's and each other."""
    seed = [params.seed, SPLITS[split], number]
    return np.random.default_rng([*seed, 1]), np.random.default_rng([*seed, 2])


def _crowded(split: str, number: int) -> bool:
    """Which scenes hold many things.

    All of `test_many` and few of the other tests; half of what is learnt from, eight in a row so that each
    of the referring data sets has its share.
    """
    if split in LEARNT:
        return number // 8 % 2 == 1
    return split == "test_many" or number % 8 == 7


def _scene(params: ScenesParams, split: str, number: int) -> Scene:
    return compose([params.seed, SPLITS[split], number], params.size, _crowded(split, number))


def _draw_muse(root: Path, params: ScenesParams, split: str, number: int) -> Drawn:
    scene = _scene(params, split, number)
    words, spoiler = _generators(params, split, number)
    questions = _asked(scene, split, number, words)
    references = _references(scene, split, number, words)
    masks: list[Mask] = [thing.mask for thing in scene.things]
    mentions = [truth(scene, question) for question in questions]
    if split == "train":
        noise = params.noise
        masks = [coarse(mask, spoiler) if spoiler.random() < noise.mask_coarse else mask for mask in masks]
        mentions = [noisy(scene, question, spoiler, noise) for question in questions]
    file_name = _coco_name(split, number)
    _save(scene.picture, root / IMAGES / file_name)
    instances = [
        (thing.kind, records.bbox(mask), int(np.count_nonzero(mask)), encode(mask))
        for thing, mask in zip(scene.things, masks, strict=True)
    ]
    return Drawn(records.muse(scene, file_name, masks, questions, mentions), references, instances)


def _asked(scene: Scene, split: str, number: int, words: np.random.Generator) -> list[Asked]:
    """MUSE's questions about a scene: half of those about a crowded one to learn from are `test_many`'s."""
    few, many = (1, 3), (4, MOST_TARGETS)
    if split not in LEARNT:
        return ask(scene, words, 3, *(many if split == "test_many" else few))
    count = 4 if split == "train" else 3
    if not _crowded(split, number):
        return ask(scene, words, count)
    long = ask(scene, words, 2, *many)
    return [*long, *ask(scene, words, count - len(long), *few)]


def _references(scene: Scene, split: str, number: int, rng: np.random.Generator) -> list[Reference]:
    """What the three referring data sets ask about a scene.

    To save space, every second image of the training split goes to one of them, in turn.
    """
    if split == "preference" or (split == "train" and number % 2):
        return []
    found = []
    things, sentences = (2, 2) if split == "train" else (2, 1)  # a picture, a thing
    datasets = {"refcoco": by_place, "refcoco+": by_look, "refcocog": in_a_sentence}
    if split == "train":
        name = ("refcoco", "refcoco+", "refcocog")[number // 2 % 3]
        datasets = {name: datasets[name]}
    for dataset, describe in datasets.items():
        picked = 0
        for thing in rng.permutation(len(scene.things)):
            texts = describe(scene, int(thing))
            if not texts or picked == things:
                continue
            picked += 1
            chosen = [texts[int(n)] for n in rng.permutation(len(texts))[:sentences]]
            part = split if split in ("train", "val") else "test"
            if part == "test" and dataset != "refcocog":
                part = "testA" if scene.things[int(thing)].kind in EDIBLE else "testB"
            found.append(Reference(dataset, part, int(thing), chosen))
    return found


def _write_references(
    folder: Path, provider: str, dataset: str, everything: list[tuple[str, int, Drawn]], size: int
) -> None:
    """instances.json and refs(<provider>).p of one referring data set."""
    images: list[Record] = []
    annotations: list[Record] = []
    refs: list[Record] = []
    sentences = 0
    # One object a text, which pickle then stores once.
    words = {
        text: (text, text.split()) for _, _, one in everything for r in one.references for text in r.sentences
    }
    for split, number, drawn in everything:
        mine = [reference for reference in drawn.references if reference.dataset == dataset]
        if not mine:
            continue
        image_id = _image_id(split, number)
        name = _coco_name(split, number)
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
        for thing, (kind, box, area, rle) in enumerate(drawn.instances):  # referred to or not, as in COCO
            shared = {"image_id": image_id, "category_id": CATEGORY_IDS[kind]}
            annotation = {"bbox": box, "area": area, "iscrowd": 0, "segmentation": rle}
            annotations.append({"id": image_id * 10 + thing, **shared, **annotation})
        for reference in mine:
            ann_id = image_id * 10 + reference.thing
            said = [
                {
                    "sent_id": sentences + place,
                    "sent": words[text][0],
                    "tokens": words[text][1],
                    "raw": words[text][0],
                }
                for place, text in enumerate(reference.sentences)
            ]
            sentences += len(said)
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": ann_id,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[drawn.instances[reference.thing][0]],
                    "split": reference.split,
                    "file_name": name.replace(".jpg", f"_{ann_id}.jpg"),
                    "sent_ids": [sentence["sent_id"] for sentence in said],
                    "sentences": said,
                }
            )
    categories = [
        {"id": CATEGORY_IDS[name], "name": name, "supercategory": KINDS[name].family} for name in KINDS
    ]
    _write_json(
        folder / "instances.json",
        {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories},
    )
    (folder / f"refs({provider}).p").write_bytes(pickle.dumps(refs, protocol=4))


Run = Callable[[Callable[[int], Any], int, str], list[Any]]


def _draw_reasonseg(folder: Path, params: ScenesParams, split: str, number: int) -> Record:
    """Draw one image with its label file; returns its explanatory record."""
    words, _ = _generators(params, f"reason_{split}", number)
    scene, question = _reasoned(params, f"reason_{split}", number, words)
    name = f"scene_{split}_{number:04d}"
    _save(scene.picture, folder / split / f"{name}.jpg")
    _write_json(folder / split / f"{name}.json", records.reasonseg(scene, question))
    answer = answer_text(question.opening, [scene.things[n].name for n in question.targets])
    return {"image": f"{name}.jpg", "query": question.text, "outputs": answer.replace(" {seg}", "")}


def _reasoned(
    params: ScenesParams, split: str, number: int, words: np.random.Generator
) -> tuple[Scene, Asked]:
    """A scene with a question that takes reasoning; another scene is tried where there is none."""
    attempt = 0
    while True:
        scene = compose([params.seed, SPLITS[split], number, attempt], params.size, _crowded(split, number))
        for question in ask(scene, words, 12):
            if question.kind in REASON_KINDS:
                return scene, question
        attempt += 1


def _write_reasonseg(folder: Path, params: ScenesParams, run: Run) -> None:
    for split, count in REASON_IMAGES.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        explained = run(partial(_draw_reasonseg, folder, params, split), count, f"reasonseg {split}")
        if split == "train":
            _write_json(folder / "explanatory/train.json", explained[::2])


def _draw_grandf(folder: Path, params: ScenesParams, split: str, number: int) -> Any:
    words, _ = _generators(params, f"grand_{split}", number)
    scene = _scene(params, f"grand_{split}", number)
    file_name = f"{_image_id(f'grand_{split}', number):012d}.jpg"
    images = "train" if split == "train" else "val_test"
    _save(scene.picture, folder / "GranDf_HA_images" / images / file_name)
    build = records.grandf_train if split == "train" else records.grandf_test
    return build(scene, file_name, words)


def _write_grandf(folder: Path, params: ScenesParams, run: Run) -> None:
    for images in ("train", "val_test"):
        (folder / "GranDf_HA_images" / images).mkdir(parents=True, exist_ok=True)
    for split, count in GRAND_IMAGES.items():
        drawn = run(partial(_draw_grandf, folder, params, split), count, f"grandf {split}")
        if split == "train":
            _write_json(folder / "annotations/train/GranDf_HA_GCG_train.json", drawn)
            continue
        captions = [{"id": number, **caption} for number, (_, caption, _) in enumerate(drawn)]
        masks = [mask for _, _, of_image in drawn for mask in of_image]
        _write_json(
            folder / f"annotations/val_test/{split}_gcg_coco_caption_gt.json",
            {"images": [{"id": image["id"]} for image, _, _ in drawn], "annotations": captions},
        )
        _write_json(
            folder / f"annotations/val_test/{split}_gcg_coco_mask_gt.json",
            {"images": [image for image, _, _ in drawn],
             "annotations": [{"id": number, **mask} for number, mask in enumerate(masks)],
             "categories": [{"id": 1, "name": "object"}]},
        )  # fmt: skip
