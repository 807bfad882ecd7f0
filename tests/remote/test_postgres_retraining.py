"""A whole `retrain` while PostgreSQL, which holds what Prefect and MLflow keep, goes away and comes back."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from popen import tracking
from popen.checkpoints import digest
from popen.promotion import registry
from popen.stages.artifacts import BUNDLE
from tests.flows.test_retraining import Data, project, write
from tests.remote.conftest import ROOT, Team
from tests.remote.test_postgres import AWAY
from tests.waiting import until

pytestmark = pytest.mark.slow

__all__ = ["project"]  # a fixture


def retrained(root: Path, team: Team, moment: Callable[[], Any], then: Callable[[], Any]) -> None:
    """`retrain` in a clone; PostgreSQL goes away at a moment of it, `then` comes next."""
    flow = team.flow(root, "flows.retraining")
    try:
        until(lambda: moment() or flow.poll() is not None)
        assert flow.poll() is None
        team.postgres.stop()
        then()
        assert not team.answers()
        time.sleep(AWAY)
        team.postgres.start()
        assert flow.wait(400) == 0
    finally:
        flow.kill()


def test_postgres_restarted_while_a_stage_works_and_while_the_champion_answers(
    project: Path, team: Team, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, samples = data
    shutil.copy(ROOT / "pyproject.toml", project)  # how patient Prefect is
    subprocess.run(["git", "add", "pyproject.toml"], cwd=project, check=True)
    subprocess.run(["git", "commit", "-qm", "settings"], cwd=project, check=True)
    hold, begun = project / "hold.here", project / "begun.here"
    hold.touch()
    retrained(project, team, begun.exists, hold.unlink)  # the stage ends while it is away

    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.mlflow)
    client = registry.connect(project)
    (first,) = registry.versions(client)
    assert registry.aliases(client) == {registry.CHAMPION: "1"}

    (project / "weights/chosen").write_text("good")
    write(project, "train", samples[:3], pictures)

    def judges() -> bool:
        """The challenge has begun: it has made its run, and the champion is not asked yet."""
        sql = "select count(*) from tags where key = 'stage' and value = 'retrain'"
        return bool(team.postgres.ask(sql, "mlflow")[0][0] > 1)

    retrained(project, team, judges, lambda: None)
    assert registry.aliases(client) == {registry.CHAMPION: "2", registry.PREVIOUS: "1"}
    second = registry.version(client, registry.CHAMPION)
    assert second is not None
    assert len(registry.versions(client)) == 2
    assert second.tags["bundle"] == digest(project / BUNDLE) != first.tags["bundle"]
    assert second.tags["data"] != first.tags["data"]
    assert set(registry.lineage(project).tags()) <= set(second.tags)
    assert mlflow.pyfunc.load_model(f"models:/{registry.NAME}@{registry.CHAMPION}")

    flows = team.ask("flow_runs/filter", limit=50)
    assert {run["state_name"] for run in flows} == {"Completed"}
    assert len(flows) == 6  # twice: retrain, the stage validate, the pipeline
    until(lambda: all(run["end_time"] for run in team.ask("task_runs/filter", limit=200)))
    assert {run["state_type"] for run in team.ask("task_runs/filter", limit=200)} == {"COMPLETED"}

    tracking.end_parent(project, tracking.start_parent(project), "FINISHED")  # as the next pipeline does
    ended = team.postgres.ask("select status, name from runs where status != 'FINISHED'", "mlflow")
    assert {(status, name.split()[0]) for status, name in ended} <= {
        ("FAILED", "retrain"),
        ("KILLED", "retrain"),
    }
