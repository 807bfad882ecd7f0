"""The tables that the data contract is checked on, and the way back from a row to its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from popen import masks
from popen.data.contract_suite import Expectation
from popen.data.records import Broken, whole
from popen.samples import SEG, Region, Sample

NAMES_KINDS = ("muse", "refcoco", "refcoco+", "refcocog")  # layouts whose annotations have a category


@dataclass(frozen=True)
class ImageFact:
    """What decoding an image told; `error` says why it cannot be used, and then the rest is empty."""

    height: int
    width: int
    digest: str
    error: str | None


@dataclass(frozen=True)
class Leak:
    """A photograph in two roles that must not share one; `image` is its path in the second, `first` in the
    first."""

    role: str
    other: str
    image: str
    first: str

    def __str__(self) -> str:
        copy = "" if self.first == self.image else f" ({self.first} of {self.role})"
        return f"{self.image}{copy}"


class Tables:
    """One table a level: records, images, photographs, samples, targets, roles; rows count from 0.

    records: rule (null: the record could be read); a record may hold several questions
    images:  image, error (null: usable)
    photographs: leak (null: in no two roles that must not share it); copies of an image are one
    samples: role, uid, question, answer, marks, targets, height, width, image_height, image_width
    targets: name, category (both null where the layout has none), area, height, width,
             mask_height, mask_width
    roles:   role, samples, kind_share (null where there are fewer than three kinds of question)
    """

    def __init__(
        self,
        roles: Mapping[str, Sequence[Sample]],
        images: Mapping[str, ImageFact],
        leaks: Sequence[Sequence[Leak]],
        unread: Sequence[Broken],
    ) -> None:
        self._leaks = leaks
        self._samples = [(role, sample) for role, samples in roles.items() for sample in samples]
        self._targets = [(sample, target) for _, sample in self._samples for target in sample.targets]
        self._users: dict[str, list[Sample]] = {path: [] for path in images}
        for _, sample in self._samples:
            self._users[sample.image].append(sample)
        self.known = sorted({o.category for _, s in self._samples for o in s.objects if o.category})
        self.frames = {
            "records": self._records(unread),
            "images": self._images(images),
            "photographs": _frame({"leak": [", ".join(map(_words, pairs)) or None for pairs in leaks]}),
            "samples": self._sample_table(images),
            "targets": self._target_table(),
            "roles": self._role_table(roles),
        }

    def broken(self, expectation: Expectation) -> list[Broken]:
        """The records behind the rows that an expectation about images, samples or targets refused."""
        frame, out = self.frames[expectation.table], []
        for row in expectation.rows:
            if expectation.table == "images":
                rule = str(frame["error"][row])
                out += [Broken.of(sample, rule) for sample in self._users[frame["image"][row]]]
            elif expectation.table == "samples":
                out.append(Broken.of(self._samples[row][1], expectation.name))
            elif expectation.table == "targets":
                sample, target = self._targets[row]
                what = f"{target.name or 'its target'}, {masks.area(target.rle)} pixels"
                out.append(Broken.of(sample, f"{expectation.name} ({what})"))
        return out

    def failures(self, expectation: Expectation) -> list[str]:
        """Messages for the rows that an expectation about photographs or roles refused."""
        if expectation.table == "roles":
            names = self.frames["roles"]["role"]
            return [f"role '{names[row]}' breaks the rule: {expectation.name}" for row in expectation.rows]
        if expectation.table != "photographs":
            return []
        shared: dict[tuple[str, str], list[Leak]] = {}
        for leak in (leak for row in expectation.rows for leak in self._leaks[row]):
            shared.setdefault((leak.role, leak.other), []).append(leak)
        return [
            f"{len(pairs)} images are in both '{a}' and '{b}', among them "
            f"{', '.join(sorted(map(str, pairs))[:3])}; take other splits or parts of them in data.splits"
            + (", or take one of two copies out" if any(leak.first != leak.image for leak in pairs) else "")
            for (a, b), pairs in shared.items()
        ]

    def _records(self, unread: Sequence[Broken]) -> pd.DataFrame:
        rules: dict[str, str | None] = {whole(sample.source): None for _, sample in self._samples}
        rules |= {whole(item.source): item.rule for item in unread}
        return _frame({"rule": list(rules.values())})

    def _images(self, images: Mapping[str, ImageFact]) -> pd.DataFrame:
        return _frame({"image": list(images), "error": [fact.error for fact in images.values()]})

    def _sample_table(self, images: Mapping[str, ImageFact]) -> pd.DataFrame:
        samples = [sample for _, sample in self._samples]
        facts = [images[sample.image] for sample in samples]
        return _frame(
            {
                "role": [role for role, _ in self._samples],
                "uid": [sample.uid for sample in samples],
                "question": [sample.question for sample in samples],
                "answer": [sample.answer for sample in samples],
                "marks": [sample.answer.count(SEG) for sample in samples],
                "targets": [len(sample.targets) for sample in samples],
                "height": [sample.height for sample in samples],
                "width": [sample.width for sample in samples],
                "image_height": [None if fact.error else fact.height for fact in facts],
                "image_width": [None if fact.error else fact.width for fact in facts],
            }
        )

    def _target_table(self) -> pd.DataFrame:
        kinds = [sample.benchmark in NAMES_KINDS for sample, _ in self._targets]
        named = [sample.benchmark != "reasonseg" for sample, _ in self._targets]
        targets = [target for _, target in self._targets]
        return _frame(
            {
                "name": [t.name if has else None for t, has in zip(targets, named, strict=True)],
                "category": [t.category if has else None for t, has in zip(targets, kinds, strict=True)],
                "area": [self._area(sample, target) for sample, target in self._targets],
                "height": [sample.height for sample, _ in self._targets],
                "width": [sample.width for sample, _ in self._targets],
                "mask_height": [target.rle["size"][0] for target in targets],
                "mask_width": [target.rle["size"][1] for target in targets],
            }
        )

    @staticmethod
    def _area(sample: Sample, target: Region) -> int | None:
        """Pixels of a target; None where it may be empty: ReasonSeg's published val asks of some images for
        what the ignored region covers, and LISA scores an empty answer to that as right."""
        area = masks.area(target.rle)
        empty = sample.benchmark == "reasonseg" and sample.split != "train" and not area
        return None if empty else area

    def _role_table(self, roles: Mapping[str, Sequence[Sample]]) -> pd.DataFrame:
        shares: list[float | None] = []
        for samples in roles.values():
            kinds = Counter(sample.kind for sample in samples if sample.kind)
            shares.append(max(kinds.values()) / kinds.total() if len(kinds) >= 3 else None)
        counts = [len(samples) for samples in roles.values()]
        return _frame({"role": list(roles), "samples": counts, "kind_share": shares})


def _frame(columns: Mapping[str, Sequence[object]]) -> pd.DataFrame:
    """The table, with the number of each row as a column: expectations return it."""
    frame = pd.DataFrame({name: list(values) for name, values in columns.items()})
    frame["row"] = range(len(frame))
    return frame


def _words(leak: Leak) -> str:
    return f"{leak} in {leak.role} and {leak.other}"
