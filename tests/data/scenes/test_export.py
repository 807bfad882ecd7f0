import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest

from popen.data import tree
from popen.data.scenes import export
from popen.data.scenes.kinds import PARTNERS
from popen.masks import area, decode
from popen.params import NoiseParams, ScenesParams
from popen.samples import SEG, Sample

NOISE = NoiseParams(absent_mentioned=0.55, present_dropped=0.11, mask_coarse=0.44)
CLEAN = NoiseParams(absent_mentioned=0, present_dropped=0, mask_coarse=0)
FEW = {"train": 4, "val": 3, "test": 3}


def params(noise: NoiseParams) -> ScenesParams:
    return ScenesParams(seed=7, size=64, train=48, preference=4, val=4, test=4, noise=noise)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A noisy tree drawn by two processes, and a clean one of the same seed drawn by one."""
    root = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "REASON_IMAGES", FEW)
        patch.setattr(export, "GRAND_IMAGES", FEW)
        patch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        export.write_tree(root / "noisy", params(NOISE), progress=False)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        export.write_tree(root / "clean", params(CLEAN), progress=False)
    return root / "noisy", root / "clean"


def muse(root: Path, split: str) -> list[dict]:
    records: list[dict] = json.loads((root / f"muse/muse_{split}.json").read_text())
    return records


def samples(root: Path) -> list[Sample]:
    found = []
    for spec in tree.specs(root):
        for sample in tree.read(root, spec):
            assert isinstance(sample, Sample), sample
            found.append(sample)
    return found


def test_our_readers_read_every_record_of_every_layout(trees: tuple[Path, Path]) -> None:
    found = samples(trees[0])
    splits = {f"{sample.benchmark}/{sample.split}" for sample in found}
    names = ("train", "preference", "val", "test_less", "test_many")
    assert splits >= {f"muse/{name}" for name in names}
    assert splits >= {f"{name}/{split}" for name in ("reasonseg", "grandf") for split in FEW}
    assert splits >= {"refcoco/train", "refcoco/val", "refcoco/testB", "refcoco+/train", "refcocog/test"}
    for sample in found:
        assert sample.answer.count(SEG) == len(sample.targets)
        assert (trees[0] / sample.image).is_file()
        assert all(area(target.rle) > 0 for target in sample.targets)


def test_no_image_is_in_two_splits(trees: tuple[Path, Path]) -> None:
    role: dict[bytes, str] = {}
    for sample in samples(trees[0]):
        split = {"testA": "test", "testB": "test", "test_less": "test", "test_many": "test"}
        name = split.get(sample.split, sample.split)
        content = (trees[0] / sample.image).read_bytes()
        assert role.setdefault(content, name) == name


def test_pictures_and_questions_do_not_depend_on_noise_or_processes(trees: tuple[Path, Path]) -> None:
    noisy, clean = trees
    files = sorted(path.relative_to(noisy) for path in noisy.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(clean) for path in clean.rglob("*") if path.is_file())
    spoiled = {"muse/muse_train.json"} | {
        f"refer_seg/{n}/instances.json" for n in ("refcoco", "refcoco+", "refcocog")
    }
    for path in files:
        if path.as_posix() not in spoiled:
            assert (noisy / path).read_bytes() == (clean / path).read_bytes(), path
    for one, other in zip(muse(noisy, "train"), muse(clean, "train"), strict=True):
        assert one["questions"] == other["questions"]
        assert [a["rephrased_name"] for a in one["ann_list"]] == [
            a["rephrased_name"] for a in other["ann_list"]
        ]


def test_only_the_noisy_training_split_names_what_is_absent(trees: tuple[Path, Path]) -> None:
    invented: dict[tuple[str, str], int] = {}
    for root in trees:
        for split in ("train", "preference", "val", "test_less", "test_many"):
            for record in muse(root, split):
                present = {annotation["category_name"] for annotation in record["ann_list"]}
                for kind, answer in zip(record["question_kinds"], record["answers"], strict=True):
                    named = {annotation["category_name"] for annotation in answer}
                    if not named <= present:
                        assert kind in ("use", "list")
                        assert named - present <= {PARTNERS[thing] for thing in named & present}
                        key = (root.name, split)
                        invented[key] = invented.get(key, 0) + 1
    assert set(invented) == {("noisy", "train")}
    assert invented["noisy", "train"] >= 10


def test_masks_of_the_training_split_are_coarse_in_the_share_asked_for(trees: tuple[Path, Path]) -> None:
    changed = []
    for one, other in zip(*(muse(root, "train") for root in trees), strict=True):
        pairs = zip(one["ann_list"], other["ann_list"], strict=True)
        changed += [noisy["segmentation"] != clean["segmentation"] for noisy, clean in pairs]
    assert sum(changed) / len(changed) == pytest.approx(0.44, abs=0.12)


def test_what_is_learnt_from_is_as_full_and_asks_for_as_much_as_the_tests(trees: tuple[Path, Path]) -> None:
    for number, record in enumerate(muse(trees[1], "train")):
        asked = [len(answer) for answer in record["answers"]]
        assert len(asked) == 4
        assert max(asked) <= 6
        if number // 8 % 2:  # a crowded scene
            assert len(record["ann_list"]) >= 6
            assert sum(count >= 4 for count in asked) == 2


def test_boxes_hold_their_masks(trees: tuple[Path, Path]) -> None:
    for record in muse(trees[0], "val") + muse(trees[0], "train")[:10]:
        for annotation in record["ann_list"]:
            x, y, width, height = annotation["bbox"]
            mask = decode(annotation["segmentation"])
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert mask[y].any()
            assert mask[:, x + width - 1].any()


def test_splits_by_number_of_targets(trees: tuple[Path, Path]) -> None:
    assert all(len(answer) <= 3 for record in muse(trees[0], "test_less") for answer in record["answers"])
    many = [len(answer) for record in muse(trees[0], "test_many") for answer in record["answers"]]
    assert min(many) >= 4


def test_references_fit_their_instances(trees: tuple[Path, Path]) -> None:
    folder = trees[0] / "refer_seg/refcoco"
    instances = json.loads((folder / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    # the whole image is annotated, as in COCO: a thing that nobody refers to is no background
    muse = [
        r
        for split in ("train", "val")
        for r in json.loads((trees[0] / f"muse/muse_{split}.json").read_text())
    ]
    things = {record["file_name"]: len(record["ann_list"]) for record in muse}
    counted = Counter(annotation["image_id"] for annotation in annotations.values())
    known = {i: things[image["file_name"]] for i, image in images.items() if image["file_name"] in things}
    assert known
    assert {i: counted[i] for i in known} == known
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]
        assert (trees[0] / export.IMAGES / images[ref["image_id"]]["file_name"]).is_file()
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        assert all(sentence["tokens"] == sentence["sent"].split() for sentence in ref["sentences"])


def test_captions_hold_their_phrases(trees: tuple[Path, Path]) -> None:
    records = json.loads((trees[0] / "GranDf/annotations/train/GranDf_HA_GCG_train.json").read_text())
    for record in records:
        for phrase, grounding in record["groundings"].items():
            start, end = grounding["token_positives"]
            assert record["caption"][start:end] == phrase
