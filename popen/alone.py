"""One stage at a time for a piece of work in a clone: two would remove each other's half-done files."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

import psutil

from popen import devices
from popen.pipeline import is_gone, process_name, state_folder

_PLACES = 2**62  # bytes of a file that can be locked
_NOTE = "launch-"


def alone(home: Path, work: str, folder: Path, wait: Callable[[], None]) -> Path:
    """Return when no other stage of the clone `home` is at `work` (hex digits), calling `wait` first where
    one is. Others wait until this process ends, however it ends. Returns the folder to work in, `folder`.

    A dead `dvc` may leave its stage at work, and two experiments may come to the same stage. A byte of one
    file stands for each piece of work (a POSIX record lock), so no files are left behind.

    Of a stage's several processes the main one waits for other stages, and its helpers for it: they would
    work in the folder that another stage is about to remove, and torch lets them wait for so long only.
    They come back with the main one's folder: its name holds the state of the code, and an edit while they
    start must not part them.
    """
    if not devices.is_main():
        return _told(home, work)
    file, place = _opened(state_folder(home) / "work.lock"), int(work, 16) % _PLACES
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        wait()
        fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
    if devices.count() > 1:
        _tell(home, work, folder)
    return folder


@cache
def _opened(path: Path) -> IO[bytes]:
    return path.open("ab")  # never closed: that would end all locks of this process in the file


def _note(home: Path) -> Path:
    """Where the processes of a stage read what their main one says: named by the process that started them
    all, so that nobody takes the note of an earlier start for theirs."""
    return state_folder(home) / f"{_NOTE}{process_name(psutil.Process(os.getppid()))}"


def _tell(home: Path, work: str, folder: Path) -> None:
    for path in state_folder(home).glob(f"{_NOTE}*"):
        if is_gone(path.name.removeprefix(_NOTE)):
            path.unlink(missing_ok=True)
    with _note(home).open("a", encoding="utf-8") as note:
        note.write(f"{work} {folder}\n")


def _told(home: Path, work: str) -> Path:
    """Waits for the main process, whose end torchrun makes that of this one (see `popen.stages.run`)."""
    note = _note(home)
    while True:
        lines = note.read_text(encoding="utf-8").split("\n")[:-1] if note.exists() else []
        for key, _, folder in (line.partition(" ") for line in lines):
            if key == work:
                return Path(folder)
        time.sleep(0.1)
