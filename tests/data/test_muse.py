from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from popen import masks
from popen.data import tree
from popen.samples import Sample
from tests.data.trees import MSCOCO, annotation, mask, muse_record, muse_tree


def samples(root: Path, spec: str = "muse/train") -> list[Sample]:
    items = list(tree.read(root, spec))
    assert all(isinstance(item, Sample) for item in items), items
    return [item for item in items if isinstance(item, Sample)]


def rules(root: Path, spec: str = "muse/train") -> list[tuple[str, str]]:
    return [(item.record, item.rule) for item in tree.read(root, spec) if isinstance(item, tree.Broken)]


def test_a_record_becomes_a_sample_a_question(tmp_path: Path) -> None:
    one, both, none = samples(muse_tree(tmp_path, train=[muse_record()]))
    assert (one.uid, one.source) == ("muse/train/0/0", "muse/muse_train.json#0/0")
    assert one.image == f"{MSCOCO}/train2014/a.png"
    assert (one.question, one.answer, one.kind) == ("What holds tea?", "The red cup {seg} does.", "use")
    assert [(t.name, t.category) for t in both.targets] == [("the red cup", "cup"), ("the fork", "fork")]
    assert both.answer == "It is the red cup {seg} and the fork {seg}."
    assert (masks.decode(both.targets[1].rle) == mask(8, 5, 3)).all()
    assert none.targets == ()
    assert "{seg}" not in none.answer
    assert [o.category for o in none.objects] == ["cup", "fork"]


def test_a_thing_without_a_name_is_called_by_its_category_in_words(tmp_path: Path) -> None:
    car = annotation("car_(automobile)", 8, 5, 3)
    record = muse_record(answers=[[car], [], []], text_answers=[None, None, None])
    sample, *_ = samples(muse_tree(tmp_path, train=[record]))
    assert sample.answer == "It is the car {seg}."
    assert (sample.targets[0].name, sample.targets[0].category) == ("the car", "car_(automobile)")


def test_coco_urls_name_their_folder(tmp_path: Path) -> None:
    url = "http://images.cocodataset.org/val2017/000000000139.jpg"
    one, *_ = samples(muse_tree(tmp_path, val=[muse_record(coco_url=url)]), "muse/val")
    assert one.image == f"{MSCOCO}/val2017/000000000139.jpg"
    old = muse_record(coco_url="http://mscoco.org/images/98304", file_name="COCO_train2014_000000098304.jpg")
    one, *_ = samples(muse_tree(tmp_path, val=[old]), "muse/val")
    assert one.image == f"{MSCOCO}/train2014/COCO_train2014_000000098304.jpg"


def test_crowds_are_uncompressed_rle(tmp_path: Path) -> None:
    crowd = annotation("cup", 0, 0, 2, segmentation={"size": [12, 16], "counts": [0, 24, 168]}, iscrowd=1)
    record = muse_record(answers=[[crowd], [crowd, crowd], []])
    one, *_ = samples(muse_tree(tmp_path, train=[record]))
    assert masks.decode(one.targets[0].rle)[:, :2].all()
    assert masks.area(one.targets[0].rle) == 24


@pytest.mark.parametrize(
    ("changes", "record", "rule"),
    [
        ({"height": "12"}, "0", "'height' is a str, not a int"),
        ({"file_name": "../../../../../../etc/passwd"}, "0", "leaves its folder"),
        ({"file_name": "/etc/passwd"}, "0", "leaves its folder"),
        ({"coco_url": "http://images.cocodataset.org/secret/a.jpg", "file_name": None}, "0", "coco_url"),
        ({"answers": []}, "0", "3 questions but 0 answers"),
        ({"ann_list": None}, "0", "annotations are a NoneType"),
        ({"text_answers": ["{seg}"]}, "0/0", "3 questions but 1 in 'text_answers'"),
        ({"text_answers": ["The cup.", None, None]}, "0/0", "0 {seg} but there are 1 targets"),
        ({"text_answers": [None, "{seg} {seg} {seg}", None]}, "0/1", "3 {seg} but there are 2 targets"),
        ({"questions": ["a", 7, "c"]}, "0/1", "the question is a int"),
        ({"questions": ["a", "b \ud83d", "c"]}, "0/1", "the question has half a character, '\\ud83d'"),
        ({"questions": ["a", "b\0", "c"]}, "0/1", "the question has a null character"),
        ({"text_answers": [None, None, "\udce9"]}, "0/2", "the entry in 'text_answers' has half a character"),
        ({"question_kinds": ["\ud83d", "b", "c"]}, "0/0", "the entry in 'question_kinds' has half"),
        ({"ann_list": [annotation("\ud83d", 1, 1, 3)]}, "0", "the key 'category_name' has half a character"),
        ({"ann_list": [annotation(" ", 1, 1, 3)]}, "0", "the category of an annotation is blank (' ')"),
        ({"file_name": "caf\udce9.jpg"}, "0", "the key 'file_name' has half a character"),
        ({"file_name": "a\0.jpg"}, "0", "the key 'file_name' has a null character"),
        ({"coco_url": "http://x/val2017/\ud83d.jpg"}, "0", "the key 'coco_url' has half a character"),
        ({"answers": [[annotation("cup", 1, 1, 3, bbox=[1, 1, 30, 3])], [], []]}, "0/0", "the box"),
        ({"answers": [[annotation("cup", 14, 1, 9)], [], []]}, "0/0", "leaves the image"),
        ({"answers": [[{"category_name": "cup"}], [], []]}, "0/0", "'segmentation' is missing"),
        (
            {"answers": [[{"segmentation": [[0, 0, 4, 0, 4, 4]]}], [], []]},
            "0/0",
            "'category_name' is missing",
        ),
        (
            {
                "answers": [
                    [annotation("cup", 0, 0, 2, segmentation={"size": [9, 9], "counts": [81]})],
                    [],
                    [],
                ]
            },
            "0/0",
            "the mask's size [9, 9] is not the image's [12, 16]",
        ),
    ],
)
def test_broken_records_are_named(tmp_path: Path, changes: dict[str, Any], record: str, rule: str) -> None:
    found = rules(muse_tree(tmp_path, train=[muse_record(**changes), muse_record(file_name="b.png")]))
    assert found[0][0] == record
    assert rule in found[0][1]
    sound = [item for item in tree.read(tmp_path, "muse/train") if isinstance(item, Sample)]
    assert [s.uid for s in sound][-3:] == ["muse/train/1/0", "muse/train/1/1", "muse/train/1/2"]


@pytest.mark.parametrize("key", ["height", "width", "questions", "answers", "file_name"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    record = muse_record()
    del record[key]
    assert rules(muse_tree(tmp_path, train=[record])) == [("0", f"the key '{key}' is missing")]


def test_a_record_that_is_no_object(tmp_path: Path) -> None:
    root = muse_tree(tmp_path, train=[muse_record()])
    (root / "muse/muse_train.json").write_text('["text"]')
    assert rules(root) == [("0", "is a str, not an object with the key 'file_name'")]


@pytest.mark.parametrize("content", ['{"a": 1}', "[{", "\xff"])
def test_a_file_that_is_no_list_of_records(tmp_path: Path, content: str) -> None:
    root = muse_tree(tmp_path, train=[muse_record()])
    (root / "muse/muse_train.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(tree.TreeError, match=r"muse/muse_train\.json"):
        list(tree.read(root, "muse/train"))
