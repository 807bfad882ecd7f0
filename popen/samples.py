"""The one type that every reader yields and everything else consumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

SEG = "{seg}"  # stands in an answer text for one target's mask


class Rle(TypedDict):
    """COCO's compressed run-length encoding; `size` is [height, width]."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class Region:
    """A named thing in an image. `name` is the phrase an answer uses ("the red cup"),
    `category` its kind ("cup"; empty where the data set names none)."""

    name: str
    category: str
    rle: Rle


@dataclass(frozen=True)
class Sample:
    """One question about one image, with its answer in words and masks.

    `answer` holds one `{seg}` a target, in the order of `targets`. `objects` is everything
    annotated in the image (what may be mentioned without hallucinating); it is empty where the
    data set annotates the asked-for region only. Pixels of `ignore` count in no metric and no loss.
    """

    uid: str  # unique over all splits: "muse/train/17/2"
    benchmark: str  # "muse", "refcoco", "refcoco+", "refcocog", "reasonseg", "grandf"
    split: str  # the native split's name: "train", "val", "test_less", "testA", ...
    image: str  # POSIX path below the data root
    height: int
    width: int
    question: str
    answer: str
    targets: tuple[Region, ...]
    objects: tuple[Region, ...] = ()
    ignore: Rle | None = None
    kind: str = ""  # kind of question where the data set tells ("use", "order", ...)
    source: str = ""  # provenance: "<file below the root>#<record>", for error messages
    digest: str = ""  # content hash of the image file, set when the sample is validated

    @property
    def annotates_all(self) -> bool:
        """True where every thing in the image is in `objects`: ReasonSeg marks the answer alone, GranD_f what
        its caption mentions."""
        return bool(self.objects) and self.benchmark not in ("reasonseg", "grandf")


def to_json(sample: Sample) -> str:
    """One line of JSON, keys sorted: the same sample always gives the same bytes."""
    return json.dumps(asdict(sample), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def from_json(line: str) -> Sample:
    record = json.loads(line)
    for field in ("targets", "objects"):
        record[field] = tuple(Region(**region) for region in record[field])
    return Sample(**record)


def write_index(path: Path, samples: Iterable[Sample]) -> int:
    """Write samples as JSON lines; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, sample in enumerate(samples, start=1):  # noqa: B007
            file.write(to_json(sample) + "\n")
    return count


def read_index(path: Path) -> Iterator[Sample]:
    """Samples of an index file written by the stage `validate`. Those of an image share its regions, which
    the file repeats for each: of a published training split a process would hold gigabytes."""
    things_of: dict[str, tuple[Region, ...]] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            sample = from_json(line)
            things = things_of.setdefault(sample.image, sample.objects)
            if things == sample.objects:
                shared = (next((thing for thing in things if thing == t), t) for t in sample.targets)
                sample = replace(sample, objects=things, targets=tuple(shared))
            yield sample
