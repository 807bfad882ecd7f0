"""Checkpoints of a training stage: a checkpoint counts only when it is complete.

They live outside DVC's outputs, in a folder named by a fingerprint of the parameters and the inputs,
so that a run never resumes what another configuration left behind. Ours; the write-sync-rename order
is the usual one for files that must survive a crash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from popen.errors import is_full

KEPT = 2  # the newest, and one more in case the newest cannot be read
_COMPLETE = re.compile(r"step-(\d{8})")


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier ones are intact. The message says what to do."""


def fingerprint(*parts: object) -> str:
    """16 hex digits that differ when any part differs. Parts: parameter groups and JSON values.

    Raises TypeError for anything else, whose text need not be the same in the next process.
    """
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents: an input as a part of a fingerprint."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such input; run the stage that makes it", str(path))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint(*[[file.relative_to(path).as_posix(), digest(file)] for file in files])


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the process or the machine dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.writing")
    draft.write_bytes(content)
    _sync(draft)
    draft.rename(path)
    _sync(path.parent)


class Checkpoints:
    """The checkpoints of one stage and fingerprint, each a folder `step-00000123`.

    One stage writes at a time (DVC locks its outputs), and of its processes the main one calls `save`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new empty folder, make it the checkpoint of `step`, keep the last two.

        Raises CheckpointError when the disk is full; other errors of `write` pass through. In both
        cases the previous checkpoint stays as it was.
        """
        final = self.folder / f"step-{step:08d}"
        draft = self.draft(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            draft.mkdir()
            write(draft)
            _sync_tree(draft)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if is_full(error):
                raise CheckpointError(
                    errno.ENOSPC,
                    f"disk full while writing the checkpoint of step {step}: free space and run "
                    "`dvc repro` again, it resumes from the last complete checkpoint",
                    str(final),
                ) from error
            raise
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        _sync(self.folder)
        for _, old in self._complete()[:-KEPT]:
            shutil.rmtree(old)
        return final

    def draft(self, step: int) -> Path:
        """The folder that `save` lets `write` fill."""
        return self.folder / f"step-{step:08d}.writing"

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint, or None."""
        complete = self._complete()
        return complete[-1] if complete else None

    def clear(self) -> None:
        """Remove them all: the stage is done and its output holds the result."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = [(match, path) for path in self.folder.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
        return sorted((int(match[1]), path) for match, path in found)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.folder.glob("*.writing"):
            shutil.rmtree(path)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
