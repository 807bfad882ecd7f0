from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popen import masks
from popen.data import tree
from popen.samples import SEG, Sample, from_json, read_index, to_json, write_index
from tests.data.trees import MSCOCO, muse_record, muse_tree, write_grandf, write_reasonseg, write_refcoco

REAL = Path(os.environ.get("POPEN_REAL_DATA", Path(__file__).parents[3] / "shared/data"))
WHY = f"no real photographs in {REAL} (set POPEN_REAL_DATA)"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("muse/train", tree.Spec("muse", "train")),
        ("muse/train[:80%]", tree.Spec("muse", "train", 0, 80)),
        ("refcoco+/testA[80%:]", tree.Spec("refcoco+", "testA", 80, 100)),
        ("grandf/val[20%:50%]", tree.Spec("grandf", "val", 20, 50)),
    ],
)
def test_specs(spec: str, expected: tree.Spec) -> None:
    assert tree.parse(spec) == expected


@pytest.mark.parametrize(
    "spec",
    ["muse", "muse/testA", "coco/train", "muse/train[80]", "muse/train[8%:2%]", "muse/train[:101%]", ""],
)
def test_specs_that_do_not_exist(spec: str) -> None:
    with pytest.raises(tree.SplitError):
        tree.parse(spec)


@given(st.text(min_size=1), st.integers(1, 99))
def test_two_parts_share_no_image_and_lose_none(image: str, cut: int) -> None:
    first, rest = tree.parse(f"muse/train[:{cut}%]"), tree.parse(f"muse/train[{cut}%:]")
    assert first.holds(image) != rest.holds(image)


def test_a_photograph_of_coco_is_in_one_part_whatever_its_folder() -> None:
    names = ("train2017/{}.jpg", "val2017/{}.jpg", "train2014/COCO_train2014_{}.jpg")
    first, places = tree.parse("muse/train[:50%]"), set[bool]()
    for number in range(50):
        here = {first.holds(f"{MSCOCO}/{name.format(f'{number:012}')}") for name in names}
        assert len(here) == 1
        places |= here
    assert places == {True, False}


def test_parts_are_by_image_and_of_about_their_size(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"ann_list": [], "answers": [[], [], []], "text_answers": None}
    records = [muse_record(file_name=f"{i}.png", **empty) for i in range(300)]
    root = muse_tree(tmp_path, train=records)
    images = [
        {item.image for item in tree.read(root, spec) if isinstance(item, Sample)}
        for spec in ("muse/train[:80%]", "muse/train[80%:]")
    ]
    assert not images[0] & images[1]
    assert len(images[0] | images[1]) == 300
    assert 40 <= len(images[1]) <= 80
    sizes = [sum(1 for _ in tree.read(root, spec)) for spec in ("muse/train", "muse/train[:80%]")]
    assert sizes == [900, 3 * len(images[0])]


def test_broken_records_are_divided_among_the_parts_as_the_sound_ones_are(tmp_path: Path) -> None:
    """Those of a whole file would weigh too much in a small part of it."""
    records = [muse_record(file_name=f"{i}.png", height=None if i % 3 else 12) for i in range(150)]
    records += [muse_record(file_name=None) for _ in range(50)]
    root = muse_tree(tmp_path, train=records)
    parts = [list(tree.read(root, spec)) for spec in ("muse/train[:40%]", "muse/train[40%:]")]
    broken = [[item for item in part if isinstance(item, tree.Broken)] for part in parts]
    assert len(broken[0]) + len(broken[1]) == len({item.record for part in broken for item in part}) == 150
    images = [{item.image for item in part if item.image} for part in broken]
    assert all(tree.parse("muse/train[:40%]").holds(image) for image in images[0])
    assert not any(tree.parse("muse/train[:40%]").holds(image) for image in images[1])
    nameless = [sum(not item.image for item in part) for part in broken]
    assert sum(nameless) == 50
    assert 10 <= nameless[0] <= 30


def test_a_missing_split_names_what_was_expected_and_what_is_there(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=[muse_record()])
    with pytest.raises(FileNotFoundError, match=r"no muse/muse_val\.json; splits found there: muse/train\."):
        tree.read(tmp_path, "muse/val")


def test_specs_of_a_tree(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=[muse_record()])
    write_refcoco(tmp_path, "refcocog")
    write_reasonseg(tmp_path, "val")
    write_grandf(tmp_path, [])
    assert tree.specs(tmp_path) == [
        "muse/train", "refcocog/train", "refcocog/val", "refcocog/test", "reasonseg/val", "grandf/train",
    ]  # fmt: skip


def test_samples_survive_the_index(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=[muse_record()])
    write_reasonseg(tmp_path, "val")
    items = [*tree.read(tmp_path, "muse/train"), *tree.read(tmp_path, "reasonseg/val")]
    samples = [item for item in items if isinstance(item, Sample)]
    assert [from_json(to_json(sample)) for sample in samples] == samples
    assert write_index(tmp_path / "index/train.jsonl", samples) == 4
    again = list(read_index(tmp_path / "index/train.jsonl"))
    assert again == samples
    one, other = again[:2]  # two questions about an image
    assert one.image == other.image
    assert one.objects is other.objects
    assert all(any(target is thing for thing in one.objects) for target in (*one.targets, *other.targets))


needs_real = [
    pytest.mark.real_data,
    pytest.mark.skipif(not REAL.is_dir(), reason=WHY),
]


@pytest.mark.parametrize(
    ("folder", "spec", "count"),
    [
        pytest.param(folder, spec, count, marks=needs_real)
        for folder, spec, count in [
            ("coco", "muse/train", 76),
            ("coco", "muse/val", 31),
            ("coco", "muse/test_less", 18),
            ("coco", "muse/test_many", 11),
            ("coco", "refcoco/train", 132),
            ("coco", "refcoco/testA", 42),
            ("coco", "refcoco+/testB", 15),
            ("coco", "refcocog/test", 27),
            ("coco", "reasonseg/train", 20),
            ("coco", "reasonseg/val", 4),
            ("coco", "grandf/train", 10),
            ("coco", "grandf/val", 4),
            ("street", "muse/train", 2569),
            ("street", "muse/val", 707),
        ]
    ],
)
def test_real_photographs(folder: str, spec: str, count: int) -> None:
    samples = list(tree.read(REAL / folder, spec))
    broken = [item for item in samples if isinstance(item, tree.Broken)]
    assert not broken
    assert len(samples) == count
    for sample in samples:
        assert isinstance(sample, Sample)
        assert sample.question
        assert sample.answer.count(SEG) == len(sample.targets)
        assert (REAL / folder / sample.image).is_file()
        for target in sample.targets:
            assert target.rle["size"] == [sample.height, sample.width]
            assert masks.area(target.rle) > 0


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=WHY)
def test_polygons_of_real_photographs_have_the_annotated_area() -> None:
    """Each annotation's own `area` is that of its polygons, to a pixel along the outline."""
    for record in json.loads((REAL / "coco/muse/muse_train.json").read_text()):
        (sample, *_) = [
            item
            for item in tree.read(REAL / "coco", "muse/train")
            if isinstance(item, Sample) and item.image.endswith(record["coco_url"].rsplit("/", 1)[1])
        ]
        for region, annotation in zip(sample.objects, record["ann_list"], strict=True):
            assert masks.area(region.rle) == pytest.approx(annotation["area"], rel=0.05, abs=20)
