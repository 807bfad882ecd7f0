"""P_t corrected by people: a file of JSON lines, written by `popen corrections export` and filled in by hand.

docs/preferences.md has the format. A file that does not fit is refused whole: a correction that is dropped
in silence is work lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from popen.params import Group
from popen.preference.records import Skipped
from popen.preference.sources import Skip, UnfitError, first_wrong, fitted, known
from popen.preference.text import Correction
from popen.samples import Sample

if TYPE_CHECKING:
    from popen.model.generate import Answer

FOLDER = Path("corrections")  # in git, and what DVC watches
SHOWN = 10  # faults of a file that a message names


class CorrectionsError(ValueError):
    """A file of corrections cannot be used; the message names file, line and reason."""


class Line(Group):
    """A line of the file: a sampled answer of a question, and its correction where there is one yet."""

    uid: str
    answer: str  # as sampled; with `uid` the line's key
    corrected: str | None = None  # None: not corrected yet; where the answer was right, the same again
    targets: list[Annotated[int, Field(strict=True)]] | None = None  # numbers of `known`, 0: none of them
    image: str = ""  # below the data root; this and what follows is for the reader
    question: str = ""
    known: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class Corrections:
    """A source of corrections (`popen.preference.sources.Source`), read from a file."""

    path: Path
    lines: Mapping[str, Mapping[str, tuple[int, Correction | None]]]  # uid -> answer -> line, correction

    @classmethod
    def read(cls, path: Path, samples: Sequence[Sample]) -> Corrections:
        """Raises CorrectionsError: no file, a broken line, an unknown uid, an answer corrected twice, {seg}
        and targets that do not go together."""
        if not path.is_file():
            raise CorrectionsError(f"{path}: no such file; `popen corrections export` writes it")
        by_uid = {sample.uid: sample for sample in samples}
        lines: dict[str, dict[str, tuple[int, Correction | None]]] = {}
        faults = []
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = Line.model_validate_json(text)
                    correction = _correction(line, by_uid)
                    if line.answer in lines.setdefault(line.uid, {}):
                        raise UnfitError(f"the answer is in line {lines[line.uid][line.answer][0]}, too")
                    lines[line.uid][line.answer] = number, correction
                except ValidationError as error:
                    first = error.errors()[0]
                    where = ".".join(map(str, first["loc"]))
                    # the parser counts lines of its own, in the one that it was given
                    said = first["msg"].partition(" at line ")[0] if text.strip() else "is empty; remove it"
                    faults.append(f"{path}, line {number}: {where + ': ' if where else ''}{said}")
                except UnfitError as error:
                    faults.append(f"{path}, line {number}: {error}")
        if faults:
            more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
            raise CorrectionsError("\n".join(faults[:SHOWN] + more))
        return cls(path, lines)

    def __call__(
        self, answers: Sequence[Answer], sample: Sample, skip: Skip
    ) -> tuple[str, Correction] | None:
        """Raises CorrectionsError on a correction of an answer that is not among the sampled ones."""
        lines = self.lines.get(sample.uid, {})
        texts = dict.fromkeys(said.text for said in answers)
        for text, (number, _) in lines.items():
            if text not in texts:
                raise CorrectionsError(
                    f"{self.path}, line {number}: {text!r} is not among the answers sampled for {sample.uid};"
                    " model, seed and sampling parameters must be those of `popen corrections export`"
                )
        return first_wrong(self._corrected(texts, sample, skip))

    def _corrected(
        self, texts: dict[str, None], sample: Sample, skip: Skip
    ) -> Iterator[tuple[str, Correction]]:
        for text in texts:
            number, correction = self.lines.get(sample.uid, {}).get(text, (None, None))
            if correction is not None:
                yield text, correction
            else:
                reason = "is not in the file" if number is None else f"line {number}: not corrected yet"
                skip(Skipped(sample.uid, text, f"{self.path}: {reason}"))


class Export:
    """A source that corrects nothing: it collects the answers that people are to correct, each once."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def __call__(self, answers: Sequence[Answer], sample: Sample, skip: Skip) -> None:
        for text in dict.fromkeys(said.text for said in answers):
            self.lines.append(
                Line(
                    uid=sample.uid,
                    answer=text,
                    image=sample.image,
                    question=sample.question,
                    known=known(sample),
                )
            )

    def write(self, path: Path) -> None:
        """Write the lines as a new file (FileExistsError: one that exists may hold somebody's work)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(line.model_dump(), ensure_ascii=False) + "\n" for line in self.lines)


def _correction(line: Line, samples: Mapping[str, Sample]) -> Correction | None:
    if line.uid not in samples:
        raise UnfitError(f"no question of the role `preference` has the uid {line.uid!r}")
    if line.corrected is None:
        return None
    return fitted(line.answer, line.corrected, line.targets or [], samples[line.uid])
