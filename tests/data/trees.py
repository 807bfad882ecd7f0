"""Tiny data trees in the native layouts, written by hand: 12 x 16 images, square masks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from popen import masks
from popen.params import ContractParams

HEIGHT, WIDTH = 12, 16
MSCOCO = "refer_seg/images/mscoco/images"
STRICT = ContractParams(tolerated=0.0, min_area=4, max_kind_share=0.6)


def write_image(path: Path, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def square(x: int, y: int, side: int) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def mask(x: int, y: int, side: int) -> masks.Mask:
    out = np.zeros((HEIGHT, WIDTH), dtype=bool)
    out[y : y + side, x : x + side] = True
    return out


def annotation(name: str, x: int, y: int, side: int, **more: Any) -> dict[str, Any]:
    return {
        "segmentation": [square(x, y, side)],
        "bbox": [x, y, side, side],
        "category_id": 1,
        "category_name": name,
        **more,
    }


def muse_record(**changes: Any) -> dict[str, Any]:
    """A cup and a fork; three questions: one thing, both, and one that is not there."""
    cup = annotation("cup", 1, 2, 4, rephrased_name="the red cup")
    fork = annotation("fork", 8, 5, 3)
    record = {
        "file_name": "a.png",
        "height": HEIGHT,
        "width": WIDTH,
        "ann_list": [cup, fork],
        "questions": ["What holds tea?", "What is on the table?", "What cuts bread?"],
        "answers": [[cup], [cup, fork], []],
        "text_answers": ["The red cup {seg} does.", None, None],
        "question_kinds": ["use", "list", "absent"],
    }
    return record | changes


def write_muse(root: Path, split: str, records: list[Any]) -> None:
    """The file, and an image for each plain file_name that is not there."""
    write_json(root / f"muse/muse_{split}.json", records)
    for record in records:
        path = root / MSCOCO / "train2014" / str(record.get("file_name", "a.png"))
        if path.suffix == ".png" and not path.exists():
            write_image(path, seed=sum(map(ord, path.name)))


def muse_tree(root: Path, **records: list[Any]) -> Path:
    for split, content in records.items():
        write_muse(root, split, content)
    return root


def ref(**changes: Any) -> dict[str, Any]:
    return {
        "ref_id": 0,
        "ann_id": 1,
        "image_id": 5,
        "category_id": 2,
        "split": "train",
        "file_name": "a_1.png",
        "sent_ids": [0, 1],
        "sentences": [
            {"sent_id": i, "sent": sent, "tokens": sent.split(), "raw": sent}
            for i, sent in enumerate(["left cup", "the red one"])
        ],
    } | changes


def write_refcoco(root: Path, name: str = "refcoco", refs: Any = None, **instances: Any) -> None:
    folder = root / "refer_seg" / name
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            annotation("", 1, 2, 4) | {"id": 1, "image_id": 5, "category_id": 2},
            annotation("", 8, 5, 3) | {"id": 2, "image_id": 5, "category_id": 3},
        ],
        "categories": [{"id": 2, "name": "cup"}, {"id": 3, "name": "fork"}],
    }
    write_json(folder / "instances.json", content | instances)
    by = "umd" if name == "refcocog" else "unc"
    (folder / f"refs({by}).p").write_bytes(pickle.dumps([ref()] if refs is None else refs, protocol=2))
    write_image(root / MSCOCO / "train2014/a.png", seed=1)


def shape(label: str, x: int, y: int, side: int) -> dict[str, Any]:
    polygon = square(x, y, side)
    return {"label": label, "points": [polygon[i : i + 2] for i in range(0, 8, 2)]}


def write_reasonseg(root: Path, split: str, stem: str = "x", **changes: Any) -> Path:
    folder = root / "reason_seg/ReasonSeg" / split
    write_image(folder / f"{stem}.jpg", seed=2)
    record = {"text": ["What holds tea?", "the thing for tea"], "is_sentence": True} | {
        "shapes": [shape("target", 1, 2, 4)]
    }
    write_json(folder / f"{stem}.json", record | changes)
    return folder / f"{stem}.json"


def grandf_record(**changes: Any) -> dict[str, Any]:
    return {
        "file_name": "g.png",
        "caption": '"A table with two cups and a fork."',
        "groundings": {
            "a fork": {"token_positives": [26, 32], "rle_masks": [masks.encode(mask(8, 5, 3))]},
            "two cups": {
                "token_positives": [13, 21],
                "rle_masks": [masks.encode(mask(1, 2, 4)), masks.encode(mask(2, 3, 5))],
            },
        },
    } | changes


def write_grandf(root: Path, records: list[Any]) -> None:
    write_json(root / "GranDf/annotations/train/GranDf_HA_GCG_train.json", records)
    write_image(root / "GranDf/GranDf_HA_images/train/g.png", seed=3)


def write_grandf_eval(root: Path, caption: str, labels: list[Any], rles: list[Any]) -> None:
    folder = root / "GranDf/annotations/val_test"
    write_json(
        folder / "val_gcg_coco_caption_gt.json",
        {
            "images": [{"id": "7"}],
            "annotations": [{"id": 0, "image_id": "7", "caption": caption, "labels": labels}],
        },
    )
    write_json(
        folder / "val_gcg_coco_mask_gt.json",
        {
            "images": [{"id": "7", "file_name": "v.png", "height": HEIGHT, "width": WIDTH}],
            "annotations": [{"id": i, "image_id": "7", "segmentation": rle} for i, rle in enumerate(rles)],
        },
    )
    write_image(root / "GranDf/GranDf_HA_images/val_test/v.png", seed=4)
