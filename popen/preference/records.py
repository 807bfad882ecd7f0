"""The files of the preference data: answers in words, pairs of masks, and the reference's values for both.

The reference (the SFT model) is frozen, so what it says about a pair is computed once, by the stage that
makes the pair; training needs no second model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from popen.samples import SEG, Region, Rle


@dataclass(frozen=True)
class TextPair:
    """P_t: a question, the model's own answer and its correction. They are equal where it was right."""

    uid: str  # of the sample
    image: str
    question: str
    chosen: str
    rejected: str
    targets: tuple[Region, ...]  # of `chosen`, in the order of its {seg}; none where not all are known
    chosen_changed: list[bool]  # a token of the answer, the end token included
    rejected_changed: list[bool]
    chosen_ref: list[float]  # log p of the same tokens under the reference
    rejected_ref: list[float]
    ignore: Rle | None = None  # the sample's: pixels that count in no loss

    @property
    def differs(self) -> bool:
        return self.chosen != self.rejected

    @property
    def fewer(self) -> bool:
        """Whether the corrected answer names fewer things than the sampled one."""
        return self.chosen.count(SEG) < self.rejected.count(SEG)

    @property
    def known(self) -> bool:
        """Whether the masks of `chosen` are known, and may supervise."""
        return self.chosen.count(SEG) == len(self.targets)


@dataclass(frozen=True)
class Skipped:
    """A sampled answer that made no pair: its source has no correction of it, or it was cut off."""

    uid: str
    answer: str
    reason: str


def write_records(path: Path, records: Iterable[TextPair | Skipped]) -> int:
    """Write both kinds as JSON lines, as they come; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # few data sets have ignore regions: a pair without one says nothing of it
    told = ({key: value for key, value in asdict(record).items() if value is not None} for record in records)
    lines = [json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n" for record in told]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_text_pairs(path: Path) -> Iterator[TextPair]:
    return (record for record in read_records(path) if isinstance(record, TextPair))


def read_records(path: Path) -> Iterator[TextPair | Skipped]:
    with path.open(encoding="utf-8") as file:  # not str.splitlines, which also splits at U+2028 and the like
        for line in file:
            record = json.loads(line)
            if "reason" in record:
                yield Skipped(**record)
            else:
                regions = tuple(Region(**region) for region in record["targets"])
                yield TextPair(**(record | {"targets": regions}))


@dataclass(frozen=True)
class MaskPairs:
    """P_s: for targets of corrected answers, a better and a worse embedding and mask (perturbed images)."""

    uids: list[str]  # P
    targets: list[int]  # P: which {seg} of the corrected answer
    winner: Tensor  # (P, S, C)
    loser: Tensor  # (P, S, C)
    reference: Tensor  # (P, S, C), from the clean image
    # what the mask form of L_s compares; (P, 0, 0) where the embedding form is asked for
    winner_masks: Tensor  # (P, H, W) bool
    loser_masks: Tensor  # (P, H, W) bool
    reference_masks: Tensor  # (P, H, W) logits, half precision
    ious: Tensor  # (P, 3): winner, loser, clean

    def __len__(self) -> int:
        return len(self.uids)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self._tensors().items()}
        save_file(tensors, folder / "pairs.safetensors")
        (folder / "pairs.json").write_text(
            json.dumps({"uids": self.uids, "targets": self.targets}), encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> MaskPairs:
        names = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
        return cls(names["uids"], names["targets"], **load_file(folder / "pairs.safetensors"))

    def of_uid(self) -> dict[str, list[int]]:
        """Sample uid -> its pairs' numbers."""
        found: dict[str, list[int]] = {}
        for number, uid in enumerate(self.uids):
            found.setdefault(uid, []).append(number)
        return found

    def pick(self, numbers: list[int]) -> MaskPairs:
        """The pairs of these numbers, in this order."""
        index = torch.tensor(numbers, dtype=torch.long)
        tensors = {name: value[index] for name, value in self._tensors().items()}
        return MaskPairs([self.uids[n] for n in numbers], [self.targets[n] for n in numbers], **tensors)

    def to(self, device: torch.device | str) -> MaskPairs:
        tensors = {name: value.to(device) for name, value in self._tensors().items()}
        return MaskPairs(self.uids, self.targets, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
