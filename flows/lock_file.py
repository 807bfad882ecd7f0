"""DVC writes `dvc.lock` in place, so a full disk leaves half of it: a whole copy is kept in `.popen/`."""

from __future__ import annotations

from pathlib import Path

import yaml

from popen.pipeline import state_folder


def settle(root: Path) -> None:
    """Keep a copy of a `dvc.lock` that is whole; put the copy in the place of one that is not.

    What ended since the copy was made, DVC then takes from its run cache. Raises OSError where the disk is
    still too full for it.
    """
    from dvc.lock import make_lock

    lock, copy = root / "dvc.lock", state_folder(root) / "dvc.lock"
    held = root / ".dvc/tmp/lock"  # DVC's own: a `Repo`, which has it too, cannot be opened on a full disk
    held.parent.mkdir(exist_ok=True)
    with make_lock(str(held), wait=True):
        if not lock.exists():
            return
        if _whole(lock):
            new = copy.with_suffix(".new")
            new.write_bytes(lock.read_bytes())
            new.replace(copy)
        elif copy.exists():
            lock.write_bytes(copy.read_bytes())


def _whole(lock: Path) -> bool:
    text = lock.read_text(encoding="utf-8", errors="replace")
    try:
        return text.endswith("\n") and isinstance(yaml.load(text, Loader=yaml.CSafeLoader), dict)
    except yaml.YAMLError:
        return False
