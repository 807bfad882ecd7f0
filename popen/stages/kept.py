"""Where a stage keeps what it has done so far, so that one that was killed goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import yaml

from popen.alone import alone
from popen.checkpoints import Checkpoints, digest, fingerprint
from popen.parts import Parts
from popen.stages.run import Run

T = TypeVar("T")


def kept_steps(run: Run, inputs: Iterable[Path], settings: Iterable[object]) -> Checkpoints:
    """A training's checkpoints, keyed by all that shapes the result.

    `inputs` are files or folders, `settings` the parameter groups that the stage depends on.
    """
    return Checkpoints(_folder(run, inputs, settings))


def kept_parts(
    run: Run,
    inputs: Iterable[Path],
    settings: Iterable[object],
    write: Callable[[Path, list[T]], object],
    read: Callable[[Path], Iterable[T]],
    cores: int = 1,
) -> Parts[T]:
    """The batches that are done; `inputs` and `settings` as for `kept_steps`, the rest as for `Parts`."""
    return Parts(_folder(run, inputs, settings), write, read, cores)


def _folder(run: Run, inputs: Iterable[Path], settings: Iterable[object]) -> Path:
    """The folder of a piece of work, once no other stage is at it."""
    work = fingerprint(run.name, run.params.seed, *settings, [digest(path) for path in inputs])
    folder = run.home / ".checkpoints" / f"{run.name}-{fingerprint(work, _code(run.name.partition('@')[0]))}"
    busy = "another process is at the same work; waiting for its end"
    return alone(run.home, work, folder, lambda: run.say(busy))


def _code(stage: str) -> list[list[str]]:
    """The state of the code that dvc.yaml names for a stage: nothing goes on from what another one left, and
    an edit elsewhere costs no training."""
    project = Path(__file__).parents[2]
    entry = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    named = [project / dep for dep in entry.get("do", entry)["deps"] if dep.startswith("popen/")]
    # of folders no compiled files, which change with every import
    files = sorted(file for path in named for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return [[file.relative_to(project).as_posix(), digest(file)] for file in files]
