"""One data tree, four native layouts: `read(root, "muse/train")` yields what the split holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from popen.data import grandf, muse, reasonseg, refcoco
from popen.data.records import Broken, TreeError
from popen.samples import Sample

__all__ = ["Broken", "Spec", "SplitError", "TreeError", "parse", "read", "specs"]

SPLITS: dict[str, tuple[str, ...]] = {
    "muse": muse.SPLITS,
    **refcoco.SPLITS,
    "reasonseg": reasonseg.SPLITS,
    "grandf": grandf.SPLITS,
}
_SPEC = re.compile(r"([a-z+]+)/(\w+)(?:\[(?:(\d{1,3})%)?:(?:(\d{1,3})%)?\])?")

_OF_2017 = re.compile(r"/(?:train|val)2017/(\d{12})\.jpg$")


class SplitError(FileNotFoundError):
    """A split is not known, or its files are not in the tree; the message says which are."""


@dataclass(frozen=True)
class Spec:
    """A native split, or the part of it whose images hash to `first` <= percent < `last`."""

    benchmark: str
    split: str
    first: int = 0
    last: int = 100

    @property
    def base(self) -> str:
        return f"{self.benchmark}/{self.split}"

    def holds(self, image: str) -> bool:
        """Whether this part has the image; decided by the path alone, whatever else is in the split. COCO
        has a photograph in the folders of two years, and both paths are in the same part."""
        key = _OF_2017.sub(r"/train2014/COCO_train2014_\1.jpg", image)
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) * 100 >> 64
        return self.first <= place < self.last


def parse(spec: str) -> Spec:
    """ "muse/train", or a part of it by image: "muse/train[:80%]", "muse/train[80%:]". Raises SplitError."""
    match = _SPEC.fullmatch(spec)
    known = ", ".join(f"{name}/{split}" for name, splits in SPLITS.items() for split in splits)
    if match is None or match[2] not in SPLITS.get(match[1], ()):
        raise SplitError(f"{spec!r} is no split; known are {known}, each also in part as muse/train[:80%]")
    first, last = int(match[3] or 0), int(match[4] or 100)
    if not first < last <= 100:
        raise SplitError(f"{spec!r}: a part runs from a smaller to a larger percentage, at most 100%")
    return Spec(match[1], match[2], first, last)


def specs(root: Path) -> list[str]:
    """The native splits this tree has files of."""
    return [
        f"{name}/{split}"
        for name, splits in SPLITS.items()
        for split in splits
        if (root / files(name, split)[0]).exists()
    ]


def files(benchmark: str, split: str) -> tuple[str, ...]:
    """What the split is read from below the root, beside the images; the first tells whether it is there."""
    if benchmark == "muse":
        return (muse.path(split),)
    if benchmark == "reasonseg":
        return (reasonseg.path(split),)
    if benchmark == "grandf":
        return (grandf.path(split),) if split == "train" else (grandf.path(split), grandf.mask_path(split))
    return (refcoco.path(benchmark), refcoco.instances(benchmark))


def read(root: Path, spec: str) -> Iterator[Sample | Broken]:
    """Samples of a split, in file order; a record that breaks a rule comes as a `Broken` in its place.

    Of a part come the broken records of its images as well; one that tells no image is in the part that its
    own name hashes to, so that every part has its share of them.
    Raises SplitError on a spec that does not exist or that the tree has no files of, TreeError
    when a file as a whole is unusable.
    """
    part = parse(spec)
    first = files(part.benchmark, part.split)[0]
    if not (root / first).exists():
        found = ", ".join(specs(root)) or "none"
        raise SplitError(
            f"{spec}: {root} has no {first}; splits found there: {found}. Correct data.root or data.splits"
        )
    return (item for item in _read(root, part) if part.holds(item.image or item.source))


def _read(root: Path, part: Spec) -> Iterator[Sample | Broken]:
    if part.benchmark == "muse":
        return muse.read(root, part.split)
    if part.benchmark == "reasonseg":
        return reasonseg.read(root, part.split)
    if part.benchmark == "grandf":
        return grandf.read(root, part.split)
    return refcoco.read(root, part.benchmark, part.split)
