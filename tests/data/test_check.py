"""Trees that are whole, lack something, or are broken in one known way each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from popen.data import published
from popen.data.check import Found, check, names, table
from popen.data.tree import SplitError
from tests.data.test_tree import REAL, needs_real
from tests.data.trees import (
    HEIGHT,
    MSCOCO,
    STRICT,
    WIDTH,
    grandf_record,
    muse_record,
    muse_tree,
    ref,
    write_grandf,
    write_grandf_eval,
    write_image,
    write_reasonseg,
    write_refcoco,
)

TRAIN = f"{MSCOCO}/train2014"


def look(
    root: Path, *splits: str, own: bool = True, decode: bool = False, pixels: int = 2**20
) -> list[Found]:
    return check(root, names(root, splits, own), pixels, STRICT, own, decode)


def only(root: Path, split: str, decode: bool = False, pixels: int = 2**20) -> Found:
    (found,) = look(root, split, decode=decode, pixels=pixels)
    return found


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Something of every layout, nothing wrong."""
    muse_tree(tmp_path, train=[muse_record(), muse_record(file_name="b.png")])
    refs = [ref(split=split) for split in ("train", "val", "testA", "testB")]
    write_refcoco(tmp_path, "refcoco", refs)
    write_reasonseg(tmp_path, "val")
    write_grandf(tmp_path, [grandf_record()])
    return tmp_path


def test_a_tree_of_ones_own_without_faults(whole: Path) -> None:
    found = look(whole)
    counts = {one.split: (one.images, one.questions) for one in found}
    assert counts == {
        "muse/train": (2, 6),
        "refcoco/train": (1, 2),
        "refcoco/val": (1, 2),
        "refcoco/testA": (1, 2),
        "refcoco/testB": (1, 2),
        "reasonseg/val": (1, 1),
        "grandf/train": (1, 1),
    }
    assert all(one.ok for one in found)
    lines = table(found).splitlines()
    assert len(lines) == 1 + len(found)
    assert lines[1].split() == ["muse/train", "2", "6", "own", "0", "0", "ok"]


def test_a_copy_of_the_published_data_must_be_whole(whole: Path) -> None:
    found = {one.split: one for one in look(whole, own=False)}
    assert list(found) == list(published.SIZES)
    assert found["muse/val"].missing_files == ["muse/muse_val.json"]
    assert found["refcoco+/val"].missing_files == [
        "refer_seg/refcoco+/refs(unc).p",
        "refer_seg/refcoco+/instances.json",
    ]
    assert found["refcoco/testA"].short == ["1 of 750 images", "2 of 5,657 questions"]
    assert found["reasonseg/val"].short == ["1 of 200 images"]  # its number of questions is not known here
    assert found["muse/train"].ok  # rounded: not held against the tree
    text = table(list(found.values()))
    assert "reasonseg/val: 1 of 200 images: not the published split as a whole" in text
    assert "muse/val: there is no muse/muse_val.json" in text


def test_published_sizes_add_up() -> None:
    """To the totals of the papers, which are counted elsewhere."""
    totals = {"refcoco": (19_994, 142_210), "refcoco+": (19_992, 141_564), "refcocog": (25_799, 95_010)}
    for name, total in totals.items():
        sizes = [size for split, size in published.SIZES.items() if split.startswith(f"{name}/")]
        assert (sum(s.images or 0 for s in sizes), sum(s.questions or 0 for s in sizes)) == total
    assert sum(published.SIZES[f"reasonseg/{s}"].images or 0 for s in ("train", "val", "test")) == 1218


def test_asked_for_by_benchmark_or_split(whole: Path) -> None:
    assert names(whole, ["muse"], own=True) == ["muse/train"]
    assert names(whole, ["muse"], own=False)[:2] == ["muse/train", "muse/val"]
    assert names(whole, ["refcocog", "muse/val"], own=True) == [
        "refcocog/train", "refcocog/val", "refcocog/test", "muse/val",
    ]  # fmt: skip
    with pytest.raises(SplitError, match="'voc' is no split; known are muse/train"):
        names(whole, ["voc"], own=False)


def test_images_that_are_not_there(whole: Path) -> None:
    (whole / TRAIN / "b.png").unlink()
    (whole / "reason_seg/ReasonSeg/val/x.jpg").unlink()
    (whole / "GranDf/GranDf_HA_images/train/g.png").unlink()
    found = {one.split: one for one in look(whole)}
    (lost,) = found["muse/train"].missing_images  # once, though three questions name it
    assert (lost.file, lost.record) == ("muse/muse_train.json", "1/0")
    assert lost.rule == f"{TRAIN}/b.png: no such file"
    assert (found["muse/train"].images, found["muse/train"].questions) == (2, 6)
    for split in ("reasonseg/val", "grandf/train"):
        assert len(found[split].missing_images) == 1
        assert not found[split].broken
    assert found["refcoco/val"].ok
    text = table(list(found.values()))
    assert f"muse/train: missing image: muse/muse_train.json, record 1/0: {TRAIN}/b.png: no such file" in text


def test_a_folder_of_images_that_is_not_there_does_not_hide_what_is_broken(tmp_path: Path) -> None:
    records = [muse_record(file_name=f"{n}.png") for n in range(9)]
    muse_tree(tmp_path, train=[*records, muse_record(answers=[])])
    for image in (tmp_path / TRAIN).iterdir():
        image.unlink()
    found = only(tmp_path, "muse/train")
    assert len(found.missing_images) == 9
    assert [item.rule for item in found.broken] == ["3 questions but 0 answers"]
    assert "missing image: and 4 more (--json lists all)" in table([found])


def test_broken_records_come_with_file_record_and_rule(tmp_path: Path) -> None:
    outside = muse_record(ann_list=[{"segmentation": [[0, 0, 99, 0, 99, 9]], "category_name": "cup"}])
    tiny = muse_record()
    tiny["answers"][0][0] = tiny["ann_list"][0] | {"segmentation": [[1, 1, 2, 1, 2, 2, 1, 2]]}
    muse_tree(tmp_path, train=[muse_record(), outside, muse_record(questions=["", "b", "c"]), tiny])
    found = only(tmp_path, "muse/train")
    assert [(item.file, item.record) for item in found.broken] == [
        ("muse/muse_train.json", record) for record in ("1", "2/0", "3/0")
    ]
    rules = [item.rule for item in found.broken]
    assert rules[0].startswith("a polygon leaves the image of")
    assert rules[1] == "questions are not empty"
    assert rules[2].startswith("targets have 4 pixels or more")


def test_a_broken_record_does_not_make_a_whole_copy_look_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = muse_record(
        file_name="2.png", ann_list=[{"segmentation": [[0, 0, 99, 0, 99, 9]], "category_name": "cup"}]
    )
    muse_tree(tmp_path, val=[muse_record(), outside])
    for images, short in ((2, []), (3, ["2 of 3 images"])):
        monkeypatch.setitem(published.SIZES, "muse/val", published.Size(images, 6))
        (found,) = look(tmp_path, "muse/val", own=False)
        assert (len(found.broken), found.images, found.questions, found.short) == (1, 2, 3, short)


def test_whole_files_that_cannot_be_used(tmp_path: Path) -> None:
    write_refcoco(tmp_path, "refcoco", [ref()])
    (tmp_path / "refer_seg/refcoco/refs(unc).p").write_bytes(b"cos\nsystem\n")
    muse_tree(tmp_path, train=[])
    (tmp_path / "muse/muse_val.json").write_text('[{"file_name": ')  # a download that broke off
    refcoco, *_, muse, val = look(tmp_path, "refcoco", "muse/train", "muse/val")
    assert "only plain data is read" in refcoco.broken[0].rule
    assert [item.rule for item in muse.broken] == ["muse/muse_train.json holds no record of muse/train"]
    assert "muse/muse_val.json is not valid JSON" in val.broken[0].rule
    assert "muse/val: broken: muse/muse_val.json is not valid JSON" in table([val])


def test_annotation_files_that_belong_together(tmp_path: Path) -> None:
    write_grandf_eval(tmp_path, "A cup.", ["A cup"], [])
    (tmp_path / "GranDf/annotations/val_test/val_gcg_coco_mask_gt.json").unlink()
    assert only(tmp_path, "grandf/val").missing_files == [
        "GranDf/annotations/val_test/val_gcg_coco_mask_gt.json"
    ]


def test_image_files_that_cannot_be_used(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=[muse_record(file_name=f"{n}.png") for n in range(4)])
    folder = tmp_path / TRAIN
    (folder / "1.png").write_bytes(b"<html>404</html>")
    write_image(folder / "2.png", 0, (HEIGHT, 20))
    write_image(folder / "3.png", 0, (40, 40))
    found = only(tmp_path, "muse/train", pixels=1000)
    by_record = {item.record: item.rule for item in found.broken}
    assert "not a readable image" in by_record["1/0"]
    assert by_record["2/0"] == "width is the image file's"
    assert "40 x 40 pixels are more than the 1000 allowed" in by_record["3/0"]
    assert len(found.broken) == 9
    assert not found.missing_images


def test_the_header_tells_of_too_many_bits(whole: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 999, dtype=np.uint16)).save(whole / TRAIN / "b.png")
    found = only(whole, "muse/train")
    assert {item.record for item in found.broken} == {"1/0", "1/1", "1/2"}
    assert "more than 8 bits a channel" in found.broken[0].rule


def test_only_decoding_finds_a_truncated_image(whole: Path) -> None:
    write_image(whole / TRAIN / "b.png", 0)
    path = whole / TRAIN / "b.png"
    os.truncate(path, path.stat().st_size - 200)
    assert only(whole, "muse/train").ok
    found = only(whole, "muse/train", decode=True)
    assert {item.record for item in found.broken} == {"1/0", "1/1", "1/2"}


def test_everything_found_is_plain_data(whole: Path) -> None:
    (whole / TRAIN / "b.png").unlink()
    (record, *_) = json.loads(json.dumps([one.to_dict() for one in look(whole, "muse/train", own=False)]))
    assert (record["ok"], record["images"], record["published"]["questions"]) == (False, 2, 239_000)
    assert record["missing_images"][0]["file"] == "muse/muse_train.json"


@pytest.mark.parametrize(
    ("folder", "splits"), [pytest.param(*case, marks=needs_real) for case in (("coco", 19), ("street", 2))]
)
def test_real_photographs_have_no_fault(folder: str, splits: int) -> None:
    found = look(REAL / folder, decode=folder == "coco")
    assert len(found) == splits
    assert all(one.ok for one in found), table(found)
