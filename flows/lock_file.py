"""DVC writes `dvc.lock` and its list of who reads what in place, so a full disk leaves half of them: of the
first a whole copy is kept in `.popen/`, the second is made anew."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from popen.pipeline import state_folder


class LockError(ValueError):
    """`dvc.lock` is for a person to mend."""


def settle(root: Path) -> None:
    """Keep a copy of a `dvc.lock` that is whole; put the copy in the place of one that is not.

    What ended since the copy was made, DVC then takes from its run cache. Raises OSError where the disk is
    still too full for it, LockError for what git could not merge.
    """
    from dvc.lock import make_lock

    lock, copy = root / "dvc.lock", state_folder(root) / "dvc.lock"
    held = root / ".dvc/tmp/lock"  # DVC's own: a `Repo`, which has it too, cannot be opened on a full disk
    held.parent.mkdir(exist_ok=True)
    with make_lock(str(held), wait=True):
        with make_lock(str(held.with_name("rwlock.lock")), wait=True):  # under which DVC writes that list
            _mend_readers(held.with_name("rwlock"))
        if not lock.exists():
            return
        if _whole(lock):
            new = copy.with_suffix(".new")
            new.write_bytes(lock.read_bytes())
            new.replace(copy)
        elif "<<<<<<<" in lock.read_text(encoding="utf-8", errors="replace"):
            raise LockError(
                f"{lock} holds what git could not merge; `git checkout --theirs dvc.lock` takes one side, "
                "and what it does not know comes from DVC's run cache"
            )
        elif copy.exists():
            lock.write_bytes(copy.read_bytes())


def _mend_readers(path: Path) -> None:
    """Remove DVC's list of readers and writers where it is cut off: DVC would refuse it for ever."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        path.unlink()


def _whole(lock: Path) -> bool:
    text = lock.read_text(encoding="utf-8", errors="replace")
    try:
        return text.endswith("\n") and isinstance(yaml.load(text, Loader=yaml.CSafeLoader), dict)
    except yaml.YAMLError:
        return False
