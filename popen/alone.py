"""One process at a time for a piece of work in a clone: two would remove each other's half-done files."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

from popen.pipeline import state_folder

_PLACES = 2**62  # bytes of a file that can be locked


def alone(home: Path, work: str, wait: Callable[[], None]) -> None:
    """Return when no other process of the clone `home` is at `work` (hex digits), calling `wait` first where
    one is. Others wait until this process ends, however it ends.

    A dead `dvc` may leave its stage at work, and two experiments may come to the same stage. A byte of one
    file stands for each piece of work (a POSIX record lock), so no files are left behind.
    """
    file, place = _opened(state_folder(home) / "work.lock"), int(work, 16) % _PLACES
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        wait()
        fcntl.lockf(file, fcntl.LOCK_EX, 1, place)


@cache
def _opened(path: Path) -> IO[bytes]:
    return path.open("ab")  # never closed: that would end all locks of this process in the file
