"""A system's answer to one question, and its file: gzipped JSON lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from popen.samples import SEG, Rle


class EvaluationError(ValueError):
    """Predictions cannot be evaluated; the message names them, what is wrong and the remedy."""


@dataclass(frozen=True)
class Prediction:
    """What a system answered, free-running: its own words decide how many masks there are.

    Raises EvaluationError unless `text` holds one `{seg}` a mask.
    """

    uid: str  # of the Sample
    text: str  # the answer, `{seg}` where a target's mask belongs
    masks: tuple[Rle, ...]  # at the image's size, in the order of the text
    loglik: float  # mean log-probability of the answer's tokens
    confidence: float  # mean certainty of the masks' pixels, 0..1
    seconds: float  # wall time of the question

    def __post_init__(self) -> None:
        named = self.text.count(SEG)
        if named != len(self.masks):
            raise EvaluationError(
                f"prediction {self.uid}: the text holds {named} {SEG} but there are {len(self.masks)} masks; "
                "give every target of the answer one mask"
            )


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> int:
    """Write predictions, same predictions to the same bytes (no time stamp); returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for count, prediction in enumerate(predictions, start=1):  # noqa: B007
            line = json.dumps(asdict(prediction), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            file.write(line.encode() + b"\n")
    return count


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Predictions of a file. Raises EvaluationError naming file and line of a broken record."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                yield Prediction(**(record | {"masks": tuple(record["masks"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise EvaluationError(
                    f"{path}, line {number}: not a prediction ({error}); run the stage evaluate again"
                ) from None
