"""Long work in numbered batches: shared by the processes of a stage, each batch a file once it is done.

What is in a batch never depends on the number of processes, and random numbers are seeded by the batch's
own number, so the results do not either. A stage that was killed goes on behind its last whole batch.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from popen import devices
from popen.orphans import end_with

T = TypeVar("T")


@dataclass(frozen=True)
class Parts(Generic[T]):
    """Where the batches of one piece of work are kept, and how.

    `folder` is named by a fingerprint of all that shapes the work (`popen.checkpoints.fingerprint`); all
    processes see it. `write` and `read` are of one file of records. With `cores` above 1 (see
    `popen.devices.cores`) a stage that is one process forks helpers which make batches beside it.
    """

    folder: Path
    write: Callable[[Path, list[T]], object]
    read: Callable[[Path], Iterable[T]]
    cores: int = 1
    before: frozenset[str] = field(init=False)  # the batches that were there when this was made

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", frozenset(path.name for path in self.folder.glob("batch-*")))

    def lacks(self, number: int) -> bool:
        """Whether a batch is still to be made. For a process beside the main one, one that was there is
        not, even if its file is gone: the main one has written the result and cleared the folder while this
        one was loading its model."""
        file = self.file(number)
        return not file.exists() and (devices.is_main() or file.name not in self.before)

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
    if parts is None:
        for number in _bar(numbers, name):
            yield from make(number)
        return
    share = numbers[devices.rank() :: devices.count()]
    mine = [n for n in share if parts.lacks(n)]
    helpers = max(1, min(parts.cores, len(mine)))

    def work(wanted: Sequence[int]) -> None:
        for number in wanted:
            parts.save(number, list(make(number)))

    with _helped(work, [mine[first::helpers] for first in range(1, helpers)]):
        work(_bar(mine[::helpers], name))
    work([n for n in share if parts.lacks(n)])  # where a helper failed: here it fails in its words
    if not devices.is_main():
        return
    for number in numbers:
        while not parts.file(number).exists() and devices.count() > 1:
            time.sleep(0.1)  # torchrun ends this process when the one that makes it has failed
        yield from parts.read(parts.file(number))


def _bar(numbers: Sequence[int], name: str) -> Any:
    return tqdm(numbers, desc=name, unit="batch", mininterval=2.0, disable=not devices.is_main())


@contextmanager
def _helped(work: Callable[[Sequence[int]], None], shares: Sequence[Sequence[int]]) -> Iterator[None]:
    """Forked processes do their shares of the work while the body does its own, and end with it."""
    helpers = [_fork(work, share) for share in shares]
    try:
        yield
        while helpers:
            os.waitpid(helpers[-1], 0)
            helpers.pop()
    finally:
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
            os.waitpid(helper, 0)


def _fork(work: Callable[[Sequence[int]], None], share: Sequence[int]) -> int:
    """Start a helper: a copy of this process that does its share and nothing else, neither the exit handlers
    of libraries nor what stands behind the caller. What it cannot do it leaves, and says nothing."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if end_with(parent, signal.SIGKILL):
            work(share)
    finally:
        os._exit(0)
