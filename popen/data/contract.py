"""The data contract: which records may be trained and measured on, and what stops the pipeline.

Two sorts of rules (ours). A rule about one *record* that fails puts the record into the quarantine;
it stops the pipeline when more than the tolerated share of a role's records is there. A rule about a *set*
(an image in two roles, a role without samples, one kind of question everywhere) cannot be mended by
leaving a record out and always stops it.

A record is what the annotation file has as one: it may hold several questions (MUSE, RefCOCO), and counts
once, however many of them are broken. Of an unreadable one nobody can tell how many questions it had.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from popen.data import tree
from popen.data.contract_suite import Expectation, run
from popen.data.contract_tables import ImageFact, Leak, Tables
from popen.data.images import ImageError, digest, locate, open_image
from popen.data.records import Broken, whole
from popen.params import ContractParams
from popen.samples import Sample

FITTED = ("train", "preference", "val")  # roles that a model or a threshold is fitted on
SHOWN = 20  # broken records that an error message lists


@dataclass(frozen=True)
class Report:
    """What the contract found. `samples` holds the accepted ones of each role, digests set."""

    splits: dict[str, list[str]]
    samples: dict[str, list[Sample]]
    broken: list[Broken]
    expectations: list[Expectation]
    failures: list[str]  # broken rules about sets
    records: int  # read in all, each once
    shares: dict[str, float]  # role -> share of its records that are broken
    tolerated: float  # of a role

    @property
    def broken_records(self) -> int:
        """Records that break one rule or more, themselves or in one of their questions."""
        return len({whole(item.source) for item in self.broken})

    @property
    def broken_share(self) -> float:
        return self.broken_records / max(1, self.records)

    @property
    def accepted(self) -> bool:
        return not self.failures and not self.too_broken

    @property
    def too_broken(self) -> list[str]:
        """Roles with a larger share of broken records than is tolerated."""
        return [role for role, share in self.shares.items() if share > self.tolerated]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; of the samples only their number."""
        return {
            "accepted": self.accepted,
            "records": self.records,
            "broken_share": self.broken_share,
            "broken_share_of_role": self.shares,
            "tolerated": self.tolerated,
            "splits": self.splits,
            "samples": {role: len(samples) for role, samples in self.samples.items()},
            "failures": self.failures,
            "expectations": [asdict(item) for item in self.expectations],
            "quarantine": [asdict(item) for item in self.broken],
        }


class ContractError(ValueError):
    """The data must not be used; the message names file, record and rule. `report` has everything."""

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = list(report.failures)
        if report.too_broken:
            worst = ", ".join(f"{report.shares[role]:.2%} in '{role}'" for role in report.too_broken)
            lines.append(
                f"{report.broken_records} of {report.records} records are broken ({worst}), tolerated are "
                f"{report.tolerated:.2%} of a role. Correct them, or raise contract.tolerated to leave them"
                " out:"
            )
            lines += [f"  {item}" for item in report.broken[:SHOWN]]
            if len(report.broken) > SHOWN:
                lines.append(f"  and {len(report.broken) - SHOWN} more")
        super().__init__("the data breaks its contract\n" + "\n".join(lines))


def validate(
    root: Path, splits: Mapping[str, Sequence[str]], max_pixels: int, contract: ContractParams
) -> Report:
    """Read the native splits of every role, check them, and return what may be used.

    Raises ContractError (with the report) when the contract is broken, SplitError when a
    split does not exist, TreeError when a file as a whole is unusable.
    """
    roles, unread_of = _read(root, splits)
    unread = list(dict.fromkeys(item for items in unread_of.values() for item in items))
    paths = sorted({sample.image for samples in roles.values() for sample in samples})
    images = inspect_images(root, paths, max_pixels)
    tables = Tables(roles, images, leaks(roles, images, splits), unread)
    expectations = run(tables, contract)
    broken = list(dict.fromkeys([*unread, *(item for e in expectations for item in tables.broken(e))]))
    bad = {item.source for item in broken}
    accepted = {
        role: [replace(s, digest=images[s.image].digest) for s in samples if s.source not in bad]
        for role, samples in roles.items()
    }
    lost = {whole(item.source) for item in broken}
    read = {
        role: {whole(s.source) for s in samples} | {whole(item.source) for item in unread_of[role]}
        for role, samples in roles.items()
    }
    failures = [text for expectation in expectations for text in tables.failures(expectation)]
    report = Report(
        splits={role: list(specs) for role, specs in splits.items()},
        samples=accepted,
        broken=broken,
        expectations=expectations,
        failures=failures + _lacks(roles, accepted),
        records=len(tables.frames["records"]),
        shares={role: len(lost & records) / max(1, len(records)) for role, records in read.items()},
        tolerated=contract.tolerated,
    )
    if not report.accepted:
        raise ContractError(report)
    return report


def _read(
    root: Path, splits: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[Sample]], dict[str, list[Broken]]]:
    """Samples of each role, and its records that no reader could make a sample of."""
    roles: dict[str, list[Sample]] = {role: [] for role in splits}
    broken: dict[str, list[Broken]] = {role: [] for role in splits}
    for role, specs in splits.items():
        for spec in specs:
            for item in tqdm(tree.read(root, spec), desc=f"read {role}: {spec}", unit=" samples"):
                if isinstance(item, Broken):
                    broken[role].append(item)
                else:
                    roles[role].append(item)
    return roles, broken


def _lacks(roles: Mapping[str, Sequence[Sample]], accepted: Mapping[str, Sequence[Sample]]) -> list[str]:
    """What a stage would miss in the accepted samples, `calibrate` after all the training."""
    found = [
        f"{role}: all of its samples are in the quarantine; correct them, or take other splits in data.splits"
        for role, samples in accepted.items()
        if roles[role] and not samples
    ]
    if accepted.get("val") and not any(sample.objects for sample in accepted["val"]):
        found.append(
            "val: none of its samples has annotated things; calibration needs a split of MUSE, RefCOCO or "
            "GranD_f in data.splits"
        )
    return found


def inspect_images(root: Path, paths: Sequence[str], max_pixels: int) -> dict[str, ImageFact]:
    """Decode every image once, in threads (decoding and hashing release the interpreter lock)."""

    def look(path: str) -> ImageFact:
        try:
            image = open_image(root, path, max_pixels)
            return ImageFact(image.height, image.width, digest(locate(root, path)), None)
        except ImageError as error:
            return ImageFact(0, 0, "", str(error))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        facts = tqdm(pool.map(look, paths), total=len(paths), desc="images", unit=" images")
        return dict(zip(paths, facts, strict=True))


def leaks(
    roles: Mapping[str, Iterable[Sample]],
    images: Mapping[str, ImageFact],
    splits: Mapping[str, Sequence[str]],
) -> list[list[Leak]]:
    """For each photograph, the pairs of roles that it is in and must not be in.

    Photographs are told apart by their content, so that a copy under another name counts as well.
    train, preference and val share with no role. Benchmarks may share with each other (RefCOCO and
    MUSE draw on the same photographs), and a benchmark made of val's own splits with val.
    """
    base = {role: {tree.parse(spec).base for spec in specs} for role, specs in splits.items()}
    where: dict[str, dict[str, str]] = defaultdict(dict)
    for role, samples in roles.items():
        for sample in samples:
            if images[sample.image].digest:
                where[images[sample.image].digest][role] = sample.image
    found = []
    for paths in where.values():
        ordered = [role for role in FITTED if role in paths] + sorted(paths.keys() - set(FITTED))
        pairs = [(a, b) for a, b in combinations(ordered, 2) if a in FITTED]
        found.append(
            [Leak(a, b, paths[b], paths[a]) for a, b in pairs if not (a == "val" and base[b] <= base[a])]
        )
    return found
