"""Long work in numbered batches: shared by the processes of a stage, each batch a file once it is done.

What is in a batch never depends on the number of processes, and random numbers are seeded by the batch's
own number, so the results do not either. A stage that was killed goes on behind its last whole batch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm

from popen import devices

T = TypeVar("T")


@dataclass(frozen=True)
class Parts(Generic[T]):
    """Where the batches of one piece of work are kept, and how.

    `folder` is named by a fingerprint of all that shapes the work (`popen.checkpoints.fingerprint`); all
    processes see it. `write` and `read` are of one file of records.
    """

    folder: Path
    write: Callable[[Path, list[T]], object]
    read: Callable[[Path], Iterable[T]]

    def file(self, number: int) -> Path:
        return self.folder / f"batch-{number:08d}"

    def save(self, number: int, records: list[T]) -> None:
        """Keep a batch: wholly or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{self.file(number).name}.writing"
        self.write(draft, records)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.rename(self.file(number))

    def clear(self) -> None:
        """Remove them all: the stage has written its result."""
        shutil.rmtree(self.folder, ignore_errors=True)


def in_batches(
    numbers: range, make: Callable[[int], Iterable[T]], name: str, parts: Parts[T] | None
) -> Iterator[T]:
    """The records of all batches, in the order of `numbers`.

    With `parts`, this process makes its share of what is not there yet; then the main process waits for the
    others' and yields everything, the others yield nothing. Without, this process makes everything.

    Args:
        make: a batch's number -> its records; a pure function of the number.
        name: what the progress bar says.
    """
    mine = numbers if parts is None else numbers[devices.rank() :: devices.count()]
    for number in tqdm(mine, desc=name, unit="batch", mininterval=2.0, disable=not devices.is_main()):
        if parts is None:
            yield from make(number)
        elif not parts.file(number).exists():
            parts.save(number, list(make(number)))
    if parts is None or not devices.is_main():
        return
    for number in numbers:
        while not parts.file(number).exists():
            time.sleep(0.1)  # torchrun ends this process when the one that makes it has failed
        yield from parts.read(parts.file(number))
