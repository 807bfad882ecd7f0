"""The graph of stages as DVC has it, and which of them DVC would run now."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popen.errors import one_line

if TYPE_CHECKING:
    from dvc.stage import Stage as DvcStage


class GraphError(ValueError):
    """The stages cannot be read: a target that is not there, a broken dvc.yaml."""


@dataclass(frozen=True)
class Stage:
    """A node: `name` as `dvc repro` takes it ("sft", "align@fine", "data.dvc"), the names of the stages
    whose outputs it reads, and whether DVC finds it out of date with the files as they are now."""

    name: str
    needs: tuple[str, ...]
    changed: bool


def read(root: Path, targets: Sequence[str] | None = None) -> list[Stage]:
    """The stages of the project in `root`, each one after those that it needs.

    With `targets` (stages, or files and folders with their stages) only those and what they need, by
    the functions that `dvc repro` plans with. Raises GraphError.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    # DVC names targets and stages relative to the current folder
    with contextlib.chdir(root), contextlib.closing(Repo(str(root), _wait_for_lock=True)) as repo:
        try:
            wanted = collect_stages(repo, list(targets or ["dvc.yaml"]))
            graph = get_active_graph(repo.index.graph)
        except DvcException as error:
            raise GraphError(f"{one_line(error)}; `dvc stage list` shows what there is") from error
        order = plan_repro(graph, wanted)
        with repo.lock:
            return [
                Stage(stage.addressing, tuple(sorted(n.addressing for n in graph[stage])), _changed(stage))
                for stage in order
            ]


def unaccompanied(stages: Sequence[Stage]) -> set[str]:
    """Names of those beside which none of the others can run: each is needed by them, or needs them.

    `stages` as `read` gives them, each after those that it needs.
    """
    above: dict[str, set[str]] = {}
    for stage in stages:
        above[stage.name] = set(stage.needs).union(*(above[name] for name in stage.needs))
    below = {name: {other for other in above if name in above[other]} for name in above}
    return {name for name in above if len(above[name]) + len(below[name]) + 1 == len(above)}


def _changed(stage: DvcStage) -> bool:
    """What `dvc repro` asks. Where it cannot be known now (the source of an import does not answer, another
    `dvc` is writing), the stage counts as changed, so that `dvc repro` on that stage decides or fails."""
    try:
        changed: Any = stage.changed()
    except Exception:
        return True
    return bool(changed)
