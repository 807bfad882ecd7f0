"""What a data tree holds, what it lacks and what is broken in it, split by split, before anything is trained.

The readers and the data contract's rules about records do the judging, so that what passes here is what
the stage `validate` takes; rules about sets (a photograph in two roles) belong to roles and are its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from popen.data import tree
from popen.data.contract_suite import run
from popen.data.contract_tables import ImageFact, Tables
from popen.data.images import AbsentImageError, ImageError, image_size, open_image
from popen.data.published import SIZES, Size
from popen.data.records import Absent, Broken, TreeError
from popen.params import ContractParams
from popen.samples import Sample


@dataclass
class Found:
    """One split. `images` are named by its records, `questions` are those of readable ones."""

    split: str
    published: Size | None  # None: the tree is its owner's, or the split is ours
    images: int = 0
    questions: int = 0
    missing_files: list[str] = field(default_factory=list)  # annotation files and folders
    missing_images: list[Absent] = field(default_factory=list)  # an image, and the first record that names it
    broken: list[Broken] = field(default_factory=list)  # an empty `record`: the file as a whole

    @property
    def short(self) -> list[str]:
        """Where the counts are not the published ones: "20 of 239 images"."""
        if self.published is None or self.published.rounded or self.missing_files:
            return []
        pairs = [(self.images, self.published.images, "images")]
        if not self.broken:  # nobody can tell how many questions an unreadable record had
            pairs.append((self.questions, self.published.questions, "questions"))
        return [f"{n:,} of {known:,} {what}" for n, known, what in pairs if known not in (None, n)]

    @property
    def ok(self) -> bool:
        return not (self.missing_files or self.missing_images or self.broken or self.short)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"short": self.short, "ok": self.ok}


def names(root: Path, asked: Sequence[str], own: bool) -> list[str]:
    """Splits to look at: those `asked` for ("muse", "refcoco/val"), else all.

    All are the published ones and what else the tree has; of an own tree what it has. Raises SplitError.
    """
    there = tree.specs(root)
    every = there if own else [*SIZES, *(split for split in there if split not in SIZES)]
    chosen: dict[str, None] = {}
    for name in asked:
        if name in tree.SPLITS:
            of_benchmark = [split for split in every if split.startswith(f"{name}/")]
            chosen |= dict.fromkeys(
                of_benchmark or (split for split in SIZES if split.startswith(f"{name}/"))
            )
        else:
            chosen[tree.parse(name).base] = None
    return list(chosen) if asked else every


def check(
    root: Path, splits: Iterable[str], max_pixels: int, contract: ContractParams, own: bool, decode: bool
) -> list[Found]:
    """Look at each split of `splits` ("muse/train").

    Args:
        max_pixels: larger images are broken.
        contract: of its numbers `min_area` counts; nothing is tolerated here.
        own: the tree is no copy of the published data: its sizes are compared with nothing.
        decode: decode every image; else its header is read, which tells its size and its bits a channel.
    """
    return [_split(root, split, max_pixels, contract, own, decode) for split in splits]


def _split(
    root: Path, split: str, max_pixels: int, contract: ContractParams, own: bool, decode: bool
) -> Found:
    found = Found(split, None if own else SIZES.get(split))
    files = tree.files(*split.split("/"))
    found.missing_files = [file for file in files if not (root / file).exists()]
    if found.missing_files:
        return found
    reading = tqdm(
        tree.read(root, split), desc=f"read {split}", unit=" samples", leave=False, mininterval=1.0
    )
    try:
        items = list(reading)
    except TreeError as error:
        found.broken = [Broken(files[0], "", str(error))]
        return found
    samples = [item for item in items if isinstance(item, Sample)]
    unread = [item for item in items if isinstance(item, Broken) and not isinstance(item, Absent)]
    first = {sample.image: sample for sample in reversed(samples)}
    facts = _facts(root, sorted(first), max_pixels, decode, split)
    told = first.keys() | {item.image for item in items if isinstance(item, Broken) and item.image}
    found.images, found.questions = len(told), len(samples)
    found.missing_images = [item for item in items if isinstance(item, Absent)]
    found.missing_images += [
        Absent.of(first[path], f"{path}: no such file") for path in sorted(first.keys() - facts.keys())
    ]
    if not items:
        found.broken = [Broken(files[0], "", f"{files[0]} holds no record of {split}")]
        return found
    usable = [sample for sample in samples if sample.image in facts]
    tables = Tables({split: usable}, facts, [], unread)
    rules = run(tables, contract) if usable else []
    found.broken = list(dict.fromkeys([*unread, *(item for rule in rules for item in tables.broken(rule))]))
    return found


def _facts(
    root: Path, paths: Sequence[str], max_pixels: int, decode: bool, split: str
) -> dict[str, ImageFact]:
    """Size or fault of every image that is there; in threads, for files are waited for."""

    def look(path: str) -> ImageFact | None:
        try:
            if decode:
                image = open_image(root, path, max_pixels)
                return ImageFact(image.height, image.width, "", None)
            return ImageFact(*image_size(root, path, max_pixels), "", None)
        except AbsentImageError:
            return None
        except ImageError as error:
            return ImageFact(0, 0, "", str(error))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looked = tqdm(
            pool.map(look, paths),
            total=len(paths),
            desc=f"images {split}",
            unit=" images",
            leave=False,
            mininterval=1.0,
        )
        return {path: fact for path, fact in zip(paths, looked, strict=True) if fact is not None}


HEAD = ("split", "images", "questions", "published", "missing", "broken", "")
SHOWN = 5  # faults of a kind that the table lists for a split


def table(found: Sequence[Found]) -> str:
    """A line a split, and below it what is wrong: files, records, rules."""
    lines = [HEAD, *(_line(one) for one in found)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEAD))]
    rows = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    faults = [text for one in found for text in _faults(one)]
    return "\n".join([*rows, *(["", *faults] if faults else [])])


def _line(one: Found) -> tuple[str, ...]:
    published = "own" if one.published is None else str(one.published)
    if one.missing_files:
        return (one.split, "-", "-", published, "all", "-", "missing")
    counts = (f"{one.images:,}", f"{one.questions:,}", published)
    verdict = "ok" if one.ok else "broken" if one.broken else "missing" if one.missing_images else "size"
    return (one.split, *counts, f"{len(one.missing_images):,}", f"{len(one.broken):,}", verdict)


def _faults(one: Found) -> list[str]:
    lines = [f"{one.split}: there is no {file}" for file in one.missing_files]
    if one.short:
        lines.append(f"{one.split}: {', '.join(one.short)}: not the published split as a whole")
    for kind, faults in (("missing image", one.missing_images), ("broken", one.broken)):
        lines += [f"{one.split}: {kind}: {item if item.record else item.rule}" for item in faults[:SHOWN]]
        if len(faults) > SHOWN:
            lines.append(f"{one.split}: {kind}: and {len(faults) - SHOWN:,} more (--json lists all)")
    return lines
