"""The contract on tiny trees in which one thing is wrong at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from popen import masks
from popen.data.contract import ContractError, Report, validate
from popen.data.images import digest
from popen.data.records import Broken
from popen.params import ContractParams
from popen.samples import write_index
from popen.stages.validate import write_report
from tests.data.test_tree import REAL, WHY
from tests.data.trees import (
    HEIGHT,
    MSCOCO,
    STRICT,
    annotation,
    grandf_record,
    muse_record,
    muse_tree,
    shape,
    write_grandf,
    write_image,
    write_reasonseg,
    write_refcoco,
)

PIXELS = 10_000
TRAIN = {"train": ["muse/train"]}


def check(
    root: Path, splits: dict[str, list[str]] = TRAIN, contract: ContractParams = STRICT, pixels: int = PIXELS
) -> Report:
    return validate(root, splits, pixels, contract)


def refusal(
    root: Path, splits: dict[str, list[str]] = TRAIN, contract: ContractParams = STRICT, pixels: int = PIXELS
) -> ContractError:
    with pytest.raises(ContractError) as caught:
        check(root, splits, contract, pixels)
    return caught.value


def named(report: Report, name: str) -> Any:
    (found,) = [item for item in report.expectations if name in item.name]
    return found


def records(count: int, *wrong: dict[str, Any]) -> list[dict[str, Any]]:
    """Sound records with images of their own, then the wrong ones."""
    return [muse_record(file_name=f"{i}.png") for i in range(count)] + list(wrong)


def test_sound_data_of_every_layout_is_accepted_with_digests(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(2), val=[muse_record(file_name="v.png")])
    write_refcoco(tmp_path)
    write_reasonseg(tmp_path, "val")
    write_grandf(tmp_path, [grandf_record()])
    splits = {
        "train": ["muse/train", "refcoco/train", "grandf/train"],
        "val": ["muse/val", "reasonseg/val"],
        "muse_val": ["muse/val"],
    }
    report = check(tmp_path, splits)
    assert {role: len(samples) for role, samples in report.samples.items()} == {
        "train": 6 + 2 + 1,
        "val": 3 + 1,
        "muse_val": 3,
    }
    assert all(item.success and item.checked for item in report.expectations)
    assert (report.broken, report.failures, report.records) == ([], [], 6)
    for samples in report.samples.values():
        for sample in samples:
            assert sample.digest == digest(tmp_path / sample.image)


def test_a_record_no_reader_can_use_stops_with_file_record_and_rule(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(1, muse_record(height=None, file_name="b.png")))
    error = refusal(tmp_path)
    assert "muse/muse_train.json, record 1: the key 'height' is a NoneType, not a int" in str(error)
    assert "1 of 2 records are broken (50.00% in 'train')" in str(error)
    assert "contract.tolerated" in str(error)
    assert not named(error.report, "can be read").success


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"questions": ["  ", "b", "c"]}, "questions are not empty"),
        (
            {"height": 11, "ann_list": [], "answers": [[], [], []], "text_answers": None},
            "height is the image",
        ),
        ({"width": 17, "ann_list": [], "answers": [[], [], []], "text_answers": None}, "width is the image"),
        ({"answers": [[annotation("cup", 1, 1, 1)], [], []]}, "targets have 4 pixels or more (the cup, 1"),
        ({"answers": [[annotation("unicorn", 1, 1, 4)], [], []]}, "categories are among the annotated ones"),
        ({"answers": [[annotation("cup", 1, 1, 4, rephrased_name=" ")], [], []]}, "targets have a name"),
        ({"answers": [[], [], []], "text_answers": ["", None, None]}, "answers are not empty"),
    ],
)
def test_rules_about_records(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    wrong = muse_record(file_name="b.png", **changes)
    muse_tree(tmp_path, train=records(2, wrong))
    error = refusal(tmp_path)
    assert f"muse/muse_train.json, record 2/0: {rule}" in str(error)
    failed = [item for item in error.report.expectations if not item.success]
    assert [item.name for item in failed if rule.split(" (")[0] in item.name]
    assert not any(sample.uid == "muse/train/2/0" for sample in error.report.samples["train"])
    assert sum(sample.uid.startswith("muse/train/0") for sample in error.report.samples["train"]) == 3


@pytest.mark.parametrize("damage", ["missing", "truncated", "too large", "a link out of the root"])
def test_an_unusable_image_breaks_all_of_its_records(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "data"
    muse_tree(root, train=records(2))
    image = root / MSCOCO / "train2014/1.png"
    pixels = PIXELS
    if damage == "missing":
        image.unlink()
    elif damage == "truncated":
        image.write_bytes(image.read_bytes()[:200])
    elif damage == "too large":
        write_image(image, 0, (120, 160))
    else:
        shutil.move(image, tmp_path / "1.png")
        image.symlink_to(tmp_path / "1.png")
    error = refusal(root, pixels=pixels)
    assert {item.record for item in error.report.broken} == {"1/0", "1/1", "1/2"}
    assert all("train2014/1.png: " in item.rule for item in error.report.broken)
    assert not named(error.report, "image is readable").success
    assert len(error.report.samples["train"]) == 3


def test_a_tolerated_share_goes_to_the_quarantine(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(3, muse_record(file_name="b.png", questions=["", "b", "c"])))
    lenient = STRICT.model_copy(update={"tolerated": 0.25})
    report = check(tmp_path, contract=lenient)  # 1 of 4
    assert report.broken == [Broken("muse/muse_train.json", "3/0", "questions are not empty")]
    assert len(report.samples["train"]) == 11
    assert report.broken_share == 1 / 4
    refusal(tmp_path, contract=STRICT.model_copy(update={"tolerated": 0.24}))


def test_an_unreadable_record_weighs_as_much_as_a_sound_one_with_its_three_questions(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(9, muse_record(height=None, file_name="b.png")))
    error = refusal(tmp_path, contract=STRICT.model_copy(update={"tolerated": 0.09}))
    assert "1 of 10 records are broken (10.00% in 'train')" in str(error)
    assert named(error.report, "can be read").checked == 10
    assert check(tmp_path, contract=STRICT.model_copy(update={"tolerated": 0.1})).accepted


@pytest.mark.parametrize(("split", "kept"), [("val", 1), ("train", 0)])
def test_what_the_ignored_region_covers_may_be_asked_for(tmp_path: Path, split: str, kept: int) -> None:
    """As of four images of ReasonSeg's published val; there is nothing to learn from it."""
    write_reasonseg(tmp_path, split, shapes=[shape("target", 2, 3, 4), shape("ignore", 2, 3, 4)])
    splits = {"test": [f"reasonseg/{split}"]}
    if kept:
        (sample,) = check(tmp_path, splits).samples["test"]
        assert masks.area(sample.targets[0].rle) == 0
        assert sample.ignore is not None
    else:
        assert "targets have 4 pixels or more" in str(refusal(tmp_path, splits))


def test_of_reasonseg_a_file_is_a_record(tmp_path: Path) -> None:
    write_reasonseg(tmp_path, "train")  # two texts
    write_reasonseg(tmp_path, "train", stem="y", text=["What holds tea?", ""])
    write_image(tmp_path / "reason_seg/ReasonSeg/train/y.jpg", seed=9)
    write_reasonseg(tmp_path, "train", stem="z", text=[])
    report = refusal(tmp_path, {"train": ["reasonseg/train"]}).report
    assert [item.record for item in report.broken] == ["z", "1"]
    assert (report.broken_records, report.records) == (2, 3)


def test_the_broken_records_of_a_part_are_compared_with_its_sound_ones(tmp_path: Path) -> None:
    content = [muse_record(file_name=f"{i}.png", height=HEIGHT if i % 10 else None) for i in range(100)]
    muse_tree(tmp_path, train=content)
    report = refusal(tmp_path, {"train": ["muse/train[:20%]"]}).report
    assert 0 < report.broken_share < 0.2  # 10 % of all; of a fifth of the sound ones and all broken 36 %
    assert 10 <= report.records <= 30


def test_a_record_that_breaks_two_rules_counts_once(tmp_path: Path) -> None:
    wrong = muse_record(
        file_name="b.png", questions=["", "b", "c"], answers=[[annotation("cup", 1, 1, 1)], [], []]
    )
    muse_tree(tmp_path, train=records(3, wrong))
    report = check(tmp_path, contract=STRICT.model_copy(update={"tolerated": 0.25}))
    assert len(report.broken) == 2
    assert report.broken_share == 1 / 4


def test_the_message_lists_twenty_and_counts_the_rest(tmp_path: Path) -> None:
    wrong = [muse_record(file_name="b.png", questions=["", "", ""]) for _ in range(9)]
    muse_tree(tmp_path, train=records(1, *wrong))
    text = str(refusal(tmp_path))
    assert text.count("questions are not empty") == 20
    assert "and 7 more" in text


def test_broken_records_of_a_split_in_parts_are_listed_once(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(12, muse_record(height=None)))
    splits = {"train": ["muse/train[:50%]"], "preference": ["muse/train[50%:]"]}
    error = refusal(tmp_path, splits)
    assert len(error.report.broken) == 1
    assert error.report.records == 12 + 1


def test_the_same_split_twice_in_a_role(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(1))
    error = refusal(tmp_path, {"train": ["muse/train", "muse/train"]})
    assert named(error.report, "ids are unique").unexpected == 6


@pytest.mark.parametrize(
    ("splits", "pair"),
    [
        ({"train": ["muse/train"], "val": ["muse/val"]}, "'train' and 'val'"),
        ({"train": ["muse/train"], "preference": ["muse/val"]}, "'train' and 'preference'"),
        ({"preference": ["muse/train"], "muse_val": ["muse/val"]}, "'preference' and 'muse_val'"),
        ({"val": ["muse/train"], "test": ["muse/val"]}, "'val' and 'test'"),
    ],
)
def test_a_copy_of_an_image_in_two_roles_stops_whatever_is_tolerated(
    tmp_path: Path, splits: dict[str, list[str]], pair: str
) -> None:
    muse_tree(tmp_path, train=records(2), val=[muse_record(file_name="v.png")])
    shutil.copy(tmp_path / MSCOCO / "train2014/1.png", tmp_path / MSCOCO / "train2014/v.png")
    error = refusal(tmp_path, splits, STRICT.model_copy(update={"tolerated": 1.0}))
    (failure,) = error.report.failures
    assert named(error.report, "no photograph is in two roles").unexpected == 1
    role = pair.split("'")[1]
    copies = f"{MSCOCO}/train2014/v.png ({MSCOCO}/train2014/1.png of {role}); take other splits"
    assert f"1 images are in both {pair}, among them {copies}" in failure
    assert failure.endswith("or take one of two copies out")
    assert failure in str(error)


def test_images_that_may_be_shared(tmp_path: Path) -> None:
    """val with the benchmark made of its own split, and benchmarks with each other."""
    muse_tree(tmp_path, val=records(20), test_less=[muse_record(file_name="a.png")])
    write_refcoco(tmp_path)  # the same a.png
    splits = {
        "val": ["muse/val[:50%]"],
        "muse_val": ["muse/val"],
        "muse_test_less": ["muse/test_less"],
        "refcoco": ["refcoco/train"],
    }
    assert check(tmp_path, splits).accepted


def test_one_kind_of_question_everywhere(tmp_path: Path) -> None:
    kinds = ["use", "use", "use", "use", "list", "absent"]
    content = [muse_record(file_name=f"{i}.png", question_kinds=kinds[3 * i : 3 * i + 3]) for i in (0, 1)]
    muse_tree(tmp_path, train=content)
    error = refusal(tmp_path)  # 4 of 6 are more than 60 %
    assert "role 'train' breaks the rule: no kind of question has more than 60%" in str(error)
    assert check(tmp_path, contract=STRICT.model_copy(update={"max_kind_share": 0.67})).accepted


def test_two_kinds_of_question_are_no_matter_of_balance(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=[muse_record(question_kinds=["use", "use", "list"])])
    assert check(tmp_path).accepted


def test_a_role_without_samples(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(1), val=[])
    assert "role 'val' breaks the rule: every role has samples" in str(
        refusal(tmp_path, {"train": ["muse/train"], "val": ["muse/val"]})
    )


def test_a_small_role_is_not_hidden_behind_a_large_one(tmp_path: Path) -> None:
    """A benchmark of which half is in the quarantine would be another benchmark."""
    val = [
        muse_record(file_name="v.png"),
        muse_record(file_name="w.png", questions=["", "b", "c"]),
        muse_record(file_name="x.png", height=None),
    ]
    muse_tree(tmp_path, train=records(27), val=val)
    roles = {"train": ["muse/train"], "val": ["muse/val"]}
    error = refusal(tmp_path, roles, STRICT.model_copy(update={"tolerated": 0.5}))
    assert "2 of 30 records are broken (66.67% in 'val'), tolerated are 50.00% of a role" in str(error)
    report = check(tmp_path, roles, STRICT.model_copy(update={"tolerated": 0.67}))
    assert report.shares == {"train": 0.0, "val": 2 / 3}
    assert report.broken_share == 2 / 30
    assert len(report.samples["val"]) == 3 + 2


def test_a_role_that_the_quarantine_leaves_nothing_of(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(9), val=[muse_record(file_name="v.png", questions=["", " ", ""])])
    roles = {"train": ["muse/train"], "val": ["muse/val"]}
    error = refusal(tmp_path, roles, STRICT.model_copy(update={"tolerated": 1.0}))
    assert error.report.failures == [
        "val: all of its samples are in the quarantine; correct them, or take other splits in data.splits"
    ]


def test_val_without_annotated_things_is_refused_before_training(tmp_path: Path) -> None:
    muse_tree(tmp_path, train=records(1))
    write_reasonseg(tmp_path, "val")
    write_reasonseg(tmp_path, "test")
    write_image(tmp_path / "reason_seg/ReasonSeg/test/x.jpg", seed=9)
    roles = {"train": ["muse/train"], "val": ["reasonseg/val"], "reasonseg": ["reasonseg/test"]}
    (failure,) = refusal(tmp_path, roles).report.failures
    assert failure.startswith("val: none of its samples has annotated things; calibration needs a")
    assert check(tmp_path, {role: specs for role, specs in roles.items() if role != "val"}).accepted


def test_texts_and_names_that_no_file_can_hold_are_named_and_left_out(tmp_path: Path) -> None:
    """JSON can spell them, and none may end in a stack trace."""
    odd: list[dict[str, Any]] = [
        {"file_name": "a\0.jpg"},
        {"file_name": "\ud83d.jpg"},
        {"file_name": "long" * 75 + ".jpg"},
    ]
    odd += [{"file_name": "circle.jpg"}, {"questions": ["\ud83d", "b", "c"]}]
    muse_tree(tmp_path / "data", train=records(1, *(muse_record(**changes) for changes in odd)))
    (tmp_path / "data" / MSCOCO / "train2014/circle.jpg").symlink_to("circle.jpg")
    report = check(tmp_path / "data", contract=STRICT.model_copy(update={"tolerated": 1.0}))
    assert report.broken_records == len(odd)
    assert len(report.samples["train"]) == 3 + 2
    write_report(tmp_path / "out", report)
    assert write_index(tmp_path / "index.jsonl", report.samples["train"]) == 5


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=WHY)
def test_real_photographs_keep_the_contract() -> None:
    street = {
        "train": ["muse/train[:80%]"],
        "preference": ["muse/train[80%:]"],
        "val": ["muse/val[:50%]"],
        "muse_val": ["muse/val[50%:]"],
    }
    report = check(REAL / "street", street, pixels=2**20)
    assert sum(map(len, report.samples.values())) == 2569 + 707
    coco = {
        "train": ["muse/train", "refcoco/train", "reasonseg/train", "grandf/train"],
        "val": ["muse/val", "refcoco/val", "reasonseg/val", "grandf/val"],
        "muse_test_many": ["muse/test_many"],
        "refcoco": ["refcoco/testA", "refcoco/testB"],
    }
    report = check(REAL / "coco", coco, pixels=2**20)
    assert report.accepted
    assert not report.broken
