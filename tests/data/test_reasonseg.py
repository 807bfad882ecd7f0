from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from popen import masks
from popen.data import tree
from popen.data.reasonseg import paint
from popen.samples import Sample
from tests.data.trees import HEIGHT, WIDTH, mask, shape, write_json, write_reasonseg


def only(items: Any) -> Sample:
    (item,) = items
    assert isinstance(item, Sample), item
    return item


def test_evaluation_asks_the_first_text_and_training_every_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_reasonseg(tmp_path, split)
    sample = only(tree.read(tmp_path, "reasonseg/val"))
    assert (sample.uid, sample.question) == ("reasonseg/val/x/0", "What holds tea?")
    assert (sample.answer, sample.ignore, sample.objects) == ("It is {seg}.", None, ())
    assert (sample.height, sample.width) == (HEIGHT, WIDTH)
    assert (masks.decode(sample.targets[0].rle) == mask(1, 2, 4)).all()
    train = [item for item in tree.read(tmp_path, "reasonseg/train") if isinstance(item, Sample)]
    assert [sample.question for sample in train] == ["What holds tea?", "the thing for tea"]


def test_a_phrase_is_made_a_question(tmp_path: Path) -> None:
    write_reasonseg(tmp_path, "test", text=["the thing for tea"], is_sentence=False)
    assert only(tree.read(tmp_path, "reasonseg/test")).question == "Please segment the thing for tea."


def test_an_explanation_follows_the_answer_to_its_question(tmp_path: Path) -> None:
    write_reasonseg(tmp_path, "train")
    entry = {"image": "x.jpg", "query": "What holds tea?", "outputs": "Cups hold drinks."}
    write_json(tmp_path / "reason_seg/ReasonSeg/explanatory/train.json", [entry])
    answers = [item.answer for item in tree.read(tmp_path, "reasonseg/train") if isinstance(item, Sample)]
    assert answers == ["It is {seg}. Cups hold drinks.", "It is {seg}."]
    write_json(tmp_path / "reason_seg/ReasonSeg/explanatory/train.json", [entry | {"outputs": "{seg}"}])
    broken, _ = tree.read(tmp_path, "reasonseg/train")
    assert isinstance(broken, tree.Broken)
    assert str(broken).startswith("reason_seg/ReasonSeg/train/x.json, record 0: 'outputs' in reason_seg/")
    write_json(tmp_path / "reason_seg/ReasonSeg/explanatory/train.json", [{"image": "x.jpg"}])
    with pytest.raises(tree.TreeError, match="explanatory"):
        list(tree.read(tmp_path, "reasonseg/train"))


def test_larger_polygons_are_painted_first_and_flags_not_at_all() -> None:
    small_target, large_ignore = shape("target", 2, 2, 3), shape("Ignore", 1, 1, 8)
    target, ignore = paint([small_target, large_ignore, shape("flag", 0, 0, 12)], HEIGHT, WIDTH)
    assert (masks.decode(target) == mask(2, 2, 3)).all()
    assert ignore is not None
    assert (masks.decode(ignore) == (mask(1, 1, 8) & ~mask(2, 2, 3))).all()
    target, ignore = paint([shape("ignore", 2, 2, 3), shape("target", 1, 1, 8)], HEIGHT, WIDTH)
    assert ignore is not None
    assert (masks.decode(ignore) == mask(2, 2, 3)).all()
    assert (masks.decode(target) == (mask(1, 1, 8) & ~mask(2, 2, 3))).all()


def test_a_flagpole_is_no_flag() -> None:
    target, _ = paint([shape("flagpole", 1, 1, 8)], HEIGHT, WIDTH)
    assert (masks.decode(target) == mask(1, 1, 8)).all()


def test_painting_twice_is_painting_once() -> None:
    shapes = [shape("target", x, 2, 4) for x in (1, 6)]
    target, ignore = paint(shapes + shapes, HEIGHT, WIDTH)
    assert ignore is None
    assert np.array_equal(masks.decode(target), mask(1, 2, 4) | mask(6, 2, 4))


def test_files_written_on_windows(tmp_path: Path) -> None:
    path = write_reasonseg(tmp_path, "val", text=["Which café is open?"])
    text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(UnicodeDecodeError):
        path.read_text(encoding="utf-8")
    assert only(tree.read(tmp_path, "reasonseg/val")).question == "Which café is open?"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert only(tree.read(tmp_path, "reasonseg/val")).question == "Which café is open?"
    assert only(tree.read(tmp_path, "reasonseg/val")).question == "Which café is open?"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"text": []}, "'text' is not a list of one or more texts"),
        ({"text": ["What is \ud83d?"]}, "'text' has half a character"),
        ({"text": ["What\0?"]}, "'text' has a null character"),
        ({"is_sentence": "yes"}, "'is_sentence' is a str"),
        ({"shapes": [{"label": "target", "points": [[1, 2], [3, 4]]}]}, "three or more points"),
        ({"shapes": [{"label": "target", "points": [[1, 2, 3], [3, 4, 5]]}]}, "not x, y pairs"),
        ({"shapes": [shape("target", 14, 2, 9)]}, "leaves the image"),
        ({"shapes": [{"points": []}]}, "'label' is missing"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    write_reasonseg(tmp_path, "val", **changes)
    write_reasonseg(tmp_path, "val", stem="y")
    broken, sound = tree.read(tmp_path, "reasonseg/val")
    assert isinstance(broken, tree.Broken)
    assert (broken.file, broken.record) == ("reason_seg/ReasonSeg/val/x.json", "x")
    assert rule in broken.rule
    assert isinstance(sound, Sample)


def test_a_name_that_is_not_utf8_is_named_and_left_out(tmp_path: Path) -> None:
    """As of a tree that was unpacked from an archive made with Latin-1."""
    sound = write_reasonseg(tmp_path, "val")
    for suffix in (".json", ".jpg"):
        odd = os.fsencode(sound.parent) + b"/caf\xe9" + suffix.encode()
        Path(os.fsdecode(odd)).write_bytes(sound.with_suffix(suffix).read_bytes())
    broken, sample = tree.read(tmp_path, "reasonseg/val")
    assert isinstance(broken, tree.Broken)
    assert (broken.file, broken.record) == ("reason_seg/ReasonSeg/val/caf\\udce9.json", "caf\\udce9")
    assert "name is not UTF-8; rename it" in broken.rule
    assert isinstance(sample, Sample)


@pytest.mark.parametrize("damage", ["no image", "no json", "truncated header", "a folder", "a dead link"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = write_reasonseg(tmp_path, "val")
    if damage == "no image":
        path.with_suffix(".jpg").unlink()
    elif damage == "no json":
        path.write_text("{")
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "a dead link":
        path.unlink()
        path.symlink_to("nowhere.json")
    else:
        path.with_suffix(".jpg").write_bytes(b"\xff\xd8\xff")
    (broken,) = tree.read(tmp_path, "reasonseg/val")
    assert isinstance(broken, tree.Broken)
    assert broken.record == "x"
