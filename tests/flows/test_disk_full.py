"""A disk that is full: what failed says so and how to go on, and the next run does."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import Make, lock, stage, status
from tests.flows.test_pipeline import Start, names, start, tasks

__all__ = ["start"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]
FILL = "cat /dev/zero > fill.here 2> /dev/null; true"
REMEDY = "The disk is full, free space and start the run again"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The project lies on a disk of 16 MB of its own, MLflow's records do not."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(records, tmp_path)}")
    disk = tmp_path / "project"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
    yield
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_stage_that_fills_the_disk_fails_with_the_remedy(make: Make, start: Start) -> None:
    big = stage("head -c ${x} /dev/zero > b.txt", "b.txt", "a.txt", params=["x"])
    root = make({"a": stage("echo 1 > a.txt", "a.txt"), "b": big}, x=30_000_000)
    state = start(root)
    assert state.is_failed()
    assert f"failed: b. {REMEDY}." in str(state.message)
    assert names(state) == {"a": "Completed", "b": "Failed"}
    failure = tasks(state)["b"]
    assert "b failed with code 255: the disk is full, free space and" in failure["state"]["message"]
    assert failure["run_count"] == 1
    assert set(lock(root)["stages"]) == {"a"}
    (root / "b.txt").unlink()  # what it left half written
    (root / "params.yaml").write_text("x: 10\n")
    assert start(root).result() == {"a": "cached", "b": "ran"}
    assert status(root) == {}


def test_a_lock_that_dvc_could_write_only_half_is_mended(make: Make, start: Start) -> None:
    """The lock's first page is nearly full after `a`; `b` leaves no second one on the disk."""
    long = {name: f"# {'x' * size}" for name, size in (("a", 3700), ("b", 700))}
    stages = {
        "a": stage(f"echo 1 > a.txt {long['a']}", "a.txt"),
        "b": stage(f"echo 1 > b.txt; {FILL} {long['b']}", deps=["a.txt"], outs=[{"b.txt": {"cache": False}}]),
    }
    root = make(stages)
    assert start(root, targets=["a"]).result() == {"a": "ran"}
    before = lock(root)
    state = start(root)
    assert f"failed: b. {REMEDY}." in str(state.message)
    assert "Updating lock file 'dvc.lock'" in tasks(state)["b"]["state"]["message"]  # so far it came
    assert lock(root) == before
    (root / "fill.here").unlink()
    stages["b"]["cmd"] = stages["b"]["cmd"].replace(FILL, "true")
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    assert start(root).result() == {"a": "cached", "b": "ran"}
    assert status(root) == {}
