"""Promotions that are killed outright, and two clones that register the same results at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from popen.promotion import registry
from popen.promotion.listing import table
from popen.promotion.registry import aliases, lineage, register, versions
from tests.promotion.conftest import GIT
from tests.promotion.test_registry import GATE, GOOD, Mortal, champion, made_champion, new

pytestmark = pytest.mark.slow

# writes of a promotion: 4 copies beside the model, version, challenger; verdict (2); note, 3 aliases, note
STEPS = 13


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def promote(clone: Path, lock: str, writes: int) -> None:
    """What `retrain` does after training, in a process of its own."""
    client: Any = Mortal(registry.connect(clone), writes, die)
    version = new(client, clone, lock)
    if aliases(client).get(registry.CHAMPION) != str(version.version):
        registry.promote(client, version, GOOD, champion(client), GATE)


def ended(clone: Path, lock: str, writes: int) -> int | None:
    """The exit code of such a process. One server imports everything once and forks for each of them."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.promotion.test_faults", "mlflow.store.tracking.sqlalchemy_store"])
    process = forks.Process(target=promote, args=(clone, lock, writes))
    process.start()
    process.join(300)
    return process.exitcode


def test_a_promotion_killed_outright_at_any_step_is_finished_by_the_next(
    empty: MlflowClient, clone: Path
) -> None:
    old = made_champion(empty, clone, "start")
    for writes in range(STEPS):
        lock, count = f"lock {writes}", len(versions(empty))
        assert ended(clone, lock, writes) == -signal.SIGKILL
        serving = aliases(empty)[registry.CHAMPION]
        assert serving == old or "gate" in empty.get_model_version(registry.NAME, serving).tags
        assert ended(clone, lock, STEPS) == 0
        (version,) = (one for one in versions(empty) if one.tags["dvc.lock"] == lock)
        assert len(versions(empty)) == count + 1
        assert aliases(empty) == {registry.CHAMPION: str(version.version), registry.PREVIOUS: old}
        assert empty.get_registered_model(registry.NAME).tags == {}
        old = str(version.version)
    assert ended(clone, "whole", STEPS) == 0  # there is no further step


class Meeting:
    """The real client, which waits before its first version and alias until the other clone is as far."""

    def __init__(self, client: MlflowClient, barrier: threading.Barrier) -> None:
        self.client, self.barrier = client, barrier
        self.met: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name in ("create_model_version", "set_registered_model_alias") and name not in self.met:
            self.met.add(name)
            self.barrier.wait(60)
        return getattr(self.client, name)


def test_two_clones_with_the_same_results_register_one_version(
    empty: MlflowClient, clone: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(clone, other, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    facts, barrier, made = lineage(clone), threading.Barrier(2), {}

    def work(root: Path) -> None:
        client: Any = Meeting(MlflowClient(f"sqlite:///{clone / 'mlflow.db'}"), barrier)
        made[root] = register(client, root, facts, "# card").version

    threads = [threading.Thread(target=work, args=(root,)) for root in (clone, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    (version,) = versions(empty)
    assert made == {clone: version.version, other: version.version}
    assert aliases(empty) == {registry.CHALLENGER: str(version.version)}


def test_a_double_whose_maker_was_killed_is_removed_by_the_next(empty: MlflowClient, clone: Path) -> None:
    facts = lineage(clone)
    first = register(empty, clone, facts, "# card")
    empty.create_model_version(registry.NAME, str(first.source), tags=facts.tags())
    assert register(empty, clone, facts, "# card").version == first.version
    assert len(versions(empty)) == 1


def test_the_commit_says_when_the_tree_was_not_its_own(empty: MlflowClient, clone: Path) -> None:
    head = lineage(clone).commit
    subprocess.run(["git", "add", "data.dvc"], cwd=clone, check=True)
    subprocess.run([*GIT, "commit", "-qm", "data"], cwd=clone, check=True)
    try:
        (clone / "untracked.txt").write_text("1")
        (clone / "data.dvc").write_text((clone / "data.dvc").read_text() + "\n")  # a run writes it
        clean = lineage(clone).commit
        assert len(clean) == len(head) == 40
        (clone / "params.yaml").write_text((clone / "params.yaml").read_text() + "\n")
        facts = lineage(clone)
        assert facts.commit == f"{clean}-dirty"
        assert register(empty, clone, facts, "# card").tags["git.commit"] == f"{clean}-dirty"
        assert f"  {clean[:8]}-dirty  " in table(empty)
    finally:
        subprocess.run(["git", "checkout", "-q", "params.yaml"], cwd=clone, check=True)
