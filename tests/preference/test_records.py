"""Preference data survive their files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from popen.preference.records import MaskPairs, TextPair, read_text_pairs, write_records
from tests.conftest import square


def pair(uid: str, rejected: str) -> TextPair:
    return TextPair(
        uid=uid,
        image="images/0.png",
        question="What?",
        chosen="It is the cup {seg}.",
        rejected=rejected,
        targets=(square(1, 2, 3),),
        chosen_changed=[False, True],
        rejected_changed=[False],
        chosen_ref=[-0.1, -1 / 3],
        rejected_ref=[-2.5],
    )


def test_text_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    # a model of bytes says anything: characters that some take for the end of a line, quotes, controls
    odd = 'a\u2028b\u2029c\x85d\x0be\x1cf\r\n"\\\t\ufffd cup’s ☕'
    pairs = [pair("muse/train/0/0", odd), pair("muse/train/0/1", "It is the cup {seg}.")]
    path = tmp_path / "deep" / "text.jsonl"
    assert write_records(path, pairs) == 2
    assert list(read_text_pairs(path)) == pairs
    assert [p.differs for p in read_text_pairs(path)] == [True, False]
    before = path.read_bytes()
    assert b"ignore" not in before
    write_records(path, pairs)
    assert path.read_bytes() == before
    assert write_records(path, []) == 0
    assert list(read_text_pairs(path)) == []


def test_an_ignore_region_comes_back_beside_pairs_that_have_none(tmp_path: Path) -> None:
    pairs = [
        dataclasses.replace(pair("reasonseg/train/0/0", "The cup {seg}."), ignore=square(4, 5, 6).rle),
        pair("muse/train/0/0", "The cup {seg}."),
    ]
    write_records(tmp_path / "text.jsonl", pairs)
    assert list(read_text_pairs(tmp_path / "text.jsonl")) == pairs


@pytest.fixture
def masks() -> MaskPairs:
    torch.manual_seed(0)
    return MaskPairs(
        ["a", "b", "a"],
        [0, 0, 1],
        winner=torch.randn(3, 2, 4),
        loser=torch.randn(3, 2, 4),
        reference=torch.randn(3, 2, 4),
        winner_masks=torch.rand(3, 5, 5) > 0.5,
        loser_masks=torch.rand(3, 5, 5) > 0.5,
        reference_masks=torch.randn(3, 5, 5).half(),
        ious=torch.rand(3, 3),
    )


def same(first: MaskPairs, second: MaskPairs) -> bool:
    def plain(pairs: MaskPairs) -> dict:
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(pairs).items()}

    return plain(first) == plain(second)


def test_mask_pairs_come_back_as_they_were(masks: MaskPairs, tmp_path: Path) -> None:
    masks.save(tmp_path / "deep" / "masks")
    again = MaskPairs.load(tmp_path / "deep" / "masks")
    assert same(again, masks)
    assert (again.winner_masks.dtype, again.reference_masks.dtype) == (torch.bool, torch.float16)
    assert len(again) == 3


def test_pairs_are_found_by_question_and_picked_in_order(masks: MaskPairs) -> None:
    assert masks.of_uid() == {"a": [0, 2], "b": [1]}
    picked = masks.pick([2, 1, 2])
    assert (picked.uids, picked.targets) == (["a", "b", "a"], [1, 0, 1])
    for field in dataclasses.fields(MaskPairs)[2:]:
        found, all_of_them = getattr(picked, field.name), getattr(masks, field.name)
        assert torch.equal(found, torch.stack([all_of_them[2], all_of_them[1], all_of_them[2]]))
    none = masks.pick([])
    assert len(none) == 0
    assert none.winner.shape == (0, 2, 4)
