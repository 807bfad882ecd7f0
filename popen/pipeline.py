"""Which pipeline a process belongs to, and what DVC and git know about it."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from pathlib import Path

import psutil
import yaml


class CloneError(FileNotFoundError):
    """There is no clone of the project where one was looked for."""


def find_root(start: Path) -> Path:
    """The nearest folder at or above `start` that DVC has initialised.

    In `dvc exp run --temp` this is the temporary workspace, where the stage's outputs belong. Raises
    CloneError where there is none.
    """
    for folder in (start, *start.parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise CloneError(f"{start}: not inside a clone of the project (no .dvc folder above it); cd into one")


def find_home(root: Path) -> Path:
    """The clone whose MLflow records and checkpoints are used: `root`, or, in a temporary workspace of
    `dvc exp run`, the clone that it was made from (DVC passes it in `DVC_ROOT`)."""
    return Path(os.environ.get("DVC_ROOT") or root)


def state_folder(home: Path) -> Path:
    """`.popen/`, git-ignored: locks and the pipelines' run ids."""
    folder = home / ".popen"
    folder.mkdir(exist_ok=True)
    return folder


def dvc_process() -> psutil.Process | None:
    """The nearest `dvc` among this process's ancestors, or None when a person started the stage."""
    for ancestor in psutil.Process().parents():
        try:
            words = ancestor.cmdline()[:3]  # "dvc repro", "python .../bin/dvc repro", "python -m dvc repro"
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in words):
            return ancestor
    return None


def process_name(process: psutil.Process | None = None) -> str:
    """ "host:pid:start" of a process, this one by default; the start is there because ids are used again."""
    pid = process.pid if process else os.getpid()
    return f"{socket.gethostname()}:{pid}:{_start(pid)}"


def is_gone(name: str) -> bool:
    """Whether the process of a `process_name` ran on this host and runs no more."""
    host, _, process = name.partition(":")
    pid, _, start = process.partition(":")
    return host == socket.gethostname() and pid.isdigit() and (_start(int(pid)) or None) != start


def parent_file(home: Path) -> Path:
    """Where the stages of one `dvc repro` share the id of their parent run.

    Files whose process is gone are removed.
    """
    for path in state_folder(home).glob("parent-*"):
        if is_gone(path.name.removeprefix("parent-")):
            path.unlink(missing_ok=True)
    return state_folder(home) / f"parent-{process_name(dvc_process())}"


def _start(pid: int) -> str:
    """Start of a process in clock ticks since boot, which no change of the clock moves; "" if gone, or ended
    and not waited for yet (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # proc(5): field 22; after ")" comes field 3, the state


def git_commit(root: Path) -> str | None:
    """The commit that is checked out, or None without git or before the first commit."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def lock_digest(root: Path) -> str | None:
    """MD5 of `dvc.lock` as it is now, or None before the first run."""
    path = root / "dvc.lock"
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.exists() else None


def data_hash(root: Path) -> str | None:
    """DVC's hash of `data/`: from `data.dvc`, else from any stage of `dvc.lock` that reads it."""
    records: list[dict[str, str]] = []
    if (root / "data.dvc").exists():
        records += _yaml(root / "data.dvc").get("outs", [])
    if (root / "dvc.lock").exists():
        for stage in _yaml(root / "dvc.lock").get("stages", {}).values():
            records += stage.get("deps", [])
    return next((entry["md5"] for entry in records if entry.get("path") == "data" and "md5" in entry), None)


def _yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
