from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from popen import masks
from popen.data import tree
from popen.samples import Sample
from tests.data.trees import HEIGHT, MSCOCO, WIDTH, annotation, mask, ref, write_refcoco


def test_a_sentence_becomes_a_sample(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    first, second = tree.read(tmp_path, "refcoco/train")
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert (first.uid, second.uid) == ("refcoco/train/0/0", "refcoco/train/0/1")
    assert first.image == f"{MSCOCO}/train2014/a.png"
    assert first.question == "Please segment left cup."
    assert first.answer == "It is the cup {seg}."
    assert (masks.decode(first.targets[0].rle) == mask(1, 2, 4)).all()
    assert [o.category for o in first.objects] == ["cup", "fork"]


@pytest.mark.parametrize(("name", "split"), [("refcoco+", "testB"), ("refcocog", "test")])
def test_the_other_sets_and_their_splits(tmp_path: Path, name: str, split: str) -> None:
    write_refcoco(tmp_path, name, refs=[ref(), ref(split=split)])
    items = list(tree.read(tmp_path, f"{name}/{split}"))
    assert [item.uid for item in items if isinstance(item, Sample)] == [
        f"{name}/{split}/1/{i}" for i in (0, 1)
    ]
    with pytest.raises(tree.SplitError, match="is no split"):
        tree.read(tmp_path, "refcocog/testA")


class Attack:
    """Unpickled by the standard library, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_names_a_global_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made-by-a-pickle"
    write_refcoco(tmp_path, refs=[ref(sentences=Attack(target))])
    with pytest.raises(tree.TreeError, match=r"refs\(unc\)\.p: names the global (posix|os|nt)\.mkdir"):
        list(tree.read(tmp_path, "refcoco/train"))
    assert not target.exists()
    pickle.loads((tmp_path / "refer_seg/refcoco/refs(unc).p").read_bytes())  # the attack is a real one
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([ref()])[:40]])
def test_a_damaged_pickle(tmp_path: Path, content: bytes) -> None:
    write_refcoco(tmp_path)
    (tmp_path / "refer_seg/refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(tree.TreeError, match="not a readable pickle"):
        list(tree.read(tmp_path, "refcoco/train"))


def test_a_pickle_that_holds_no_list(tmp_path: Path) -> None:
    write_refcoco(tmp_path, refs={"a": 1})
    with pytest.raises(tree.TreeError, match="a list is expected"):
        list(tree.read(tmp_path, "refcoco/train"))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"image_id": 6}, "no image 6"),
        ({"ann_id": 9}, "no annotation 9 of image 5"),
        ({"ann_id": "1"}, "'ann_id' is a str"),
        ({"sentences": [{"raw": "x"}]}, "'sent' is missing"),
        ({"sentences": None}, "'sentences' is a NoneType"),
        ({"sentences": [{"sent": "left \ud83d"}]}, "the key 'sent' has half a character"),
    ],
)
def test_broken_references_are_named(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    write_refcoco(tmp_path, refs=[ref(**changes), ref()])
    broken, *sound = tree.read(tmp_path, "refcoco/train")
    assert isinstance(broken, tree.Broken)
    assert (broken.file, broken.record) == ("refer_seg/refcoco/refs(unc).p", "0")
    assert rule in broken.rule
    assert len(sound) == 2


def test_a_bad_sentence_breaks_its_record_as_a_whole(tmp_path: Path) -> None:
    """Those before it were once used all the same, and those behind it lost without a word."""
    sentences = [{"sent": "left cup"}, {"sent": 3}, {"sent": "cup"}]
    write_refcoco(tmp_path, "refcoco", [ref(sentences=sentences)])
    (found,) = tree.read(tmp_path, "refcoco/train")
    assert isinstance(found, tree.Broken)
    assert (found.record, found.rule) == ("0", "the key 'sent' is a int, not a str")


@pytest.mark.parametrize(
    ("name", "rule"), [("a\0.png", "has a null character"), ("\ud83d.png", "has half a character")]
)
def test_file_names_that_no_file_has(tmp_path: Path, name: str, rule: str) -> None:
    write_refcoco(tmp_path, images=[{"id": 5, "file_name": name, "height": HEIGHT, "width": WIDTH}])
    (broken,) = tree.read(tmp_path, "refcoco/train")
    assert isinstance(broken, tree.Broken)
    assert broken.rule.startswith(f"the key 'file_name' {rule}")


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"category_id": 99}, "annotation 2 has the unknown category 99"),
        (
            {"segmentation": [[0, 0, 40, 0, 4, 4]]},
            "annotation 2 in instances.json: a polygon leaves the image",
        ),
        ({"bbox": [8, 5, 30, 3]}, "annotation 2 in instances.json: the box"),
    ],
)
def test_a_broken_neighbour_breaks_the_list_of_objects(
    tmp_path: Path, changed: dict[str, Any], rule: str
) -> None:
    sound = annotation("", 1, 2, 4) | {"id": 1, "image_id": 5, "category_id": 2}
    bad = annotation("", 8, 5, 3) | {"id": 2, "image_id": 5, "category_id": 3} | changed
    write_refcoco(tmp_path, annotations=[sound, bad])
    (broken,) = tree.read(tmp_path, "refcoco/train")
    assert isinstance(broken, tree.Broken)
    assert rule in broken.rule


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    write_refcoco(tmp_path, categories=[{"id": 2, "name": "cup"}, {"id": 2, "name": "fork"}])
    with pytest.raises(tree.TreeError, match="1 of the 'categories' have an id that another has"):
        list(tree.read(tmp_path, "refcoco/train"))


def test_instances_that_are_missing(tmp_path: Path) -> None:
    write_refcoco(tmp_path)
    (tmp_path / "refer_seg/refcoco/instances.json").unlink()
    with pytest.raises(tree.TreeError, match=r"no refer_seg/refcoco/instances\.json"):
        list(tree.read(tmp_path, "refcoco/train"))
