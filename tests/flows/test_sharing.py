"""What flows of several clones share through DVC's remote, and what they say where it fails."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from flows import pipeline
from tests.flows.conftest import Make, commit, lock, stage
from tests.flows.test_pipeline import Start, mlflow_runs, names, start, tasks

__all__ = ["start"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]


def test_what_one_clone_has_computed_another_restores(make: Make, start: Start, tmp_path: Path) -> None:
    cmd = "echo {0} >> ran.here; echo {0} > {0}.txt"
    # what depends on nothing DVC never takes from the run cache
    root = make({n: stage(cmd.format(n), f"{n}.txt", params=["x"]) for n in "ab"}, x=1)
    with (root / ".dvc/config").open("a") as file:
        file.write(f"    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n")
    commit(root)
    other = tmp_path / "other"
    subprocess.run(["git", "clone", "-q", str(root), str(other)], check=True)
    assert start(root, share=True).result() == {"a": "ran", "b": "ran"}
    state = start(other, share=True)
    assert state.result() == {"a": "restored", "b": "restored"}
    assert not (other / "ran.here").exists()
    assert lock(other) == lock(root)
    assert {"pull", "push"} <= set(tasks(state))


def test_what_failed_first_is_told_where_sharing_fails_too(
    make: Make,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`retrain` looks for the pipeline's own error: a push that failed behind it once took its place."""
    monkeypatch.setattr(pipeline, "PAUSES", [])
    store = tmp_path / "store"
    store.mkdir()
    broken = stage(f"rm -r {store}; touch {store}; exit ${{x}}", "b.txt", "a.txt", params=["x"])
    root = make({"a": stage("echo 1 > a.txt", "a.txt"), "b": broken}, x=3)
    with (root / ".dvc/config").open("a") as file:
        file.write(f"    remote = store\n['remote \"store\"']\n    url = {store}\n")
    commit(root)
    log = logging.getLogger("prefect.flow_runs")  # it hands nothing on to the root, where caplog listens
    log.addHandler(caplog.handler)
    try:
        state = start(root, share=True)
    finally:
        log.removeHandler(caplog.handler)
    with pytest.raises(pipeline.PipelineError, match=r"failed: b\."):
        state.result()
    assert names(state) == {"pull": "Completed", "a": "Completed", "b": "Failed", "push": "Failed"}
    assert "What was finished could not be shared: dvc push failed" in caplog.text
    assert [run.info.status for run in mlflow_runs(root)] == ["FAILED"]
