"""Prefect's server and MLflow on PostgreSQL: runs, the registry, dumps, and PostgreSQL away for a while."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from popen.promotion import registry
from popen.promotion.registry import RegistryError, aliases, versions
from popen.stages.artifacts import BUNDLE
from popen.stages.model_record import record
from tests.flows.conftest import Make, stage, status
from tests.flows.test_pipeline import DIAMOND
from tests.promotion.test_registry import GATE, GOOD, Mortal, champion, made_champion, new
from tests.remote.conftest import ROOT, Team
from tests.waiting import until

pytestmark = pytest.mark.slow

AWAY = 5.0  # seconds
ENDED = dict.fromkeys([*"abcd", "mlflow run"], "Completed")


def newest(team: Team) -> tuple[str, dict[str, str]]:
    """The state of the newest flow run, and of its tasks by name."""
    run = team.ask("flow_runs/filter", sort="START_TIME_DESC", limit=1)[0]
    tasks = team.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    return run["state_name"], {task["name"]: task["state_name"] for task in tasks}


def test_a_run_and_its_records_are_in_postgres(make: Make, team: Team) -> None:
    root = make(DIAMOND, x=1)
    assert team.flow(root).wait() == 0
    assert status(root) == {}
    until(lambda: newest(team) == ("Completed", ENDED))  # tasks reach the server as events
    assert team.postgres.ask("select state_type from flow_run", "prefect") == [("COMPLETED",)]
    assert team.postgres.ask("select status from runs", "mlflow") == [("FINISHED",)]


def test_postgres_restarted_in_the_middle_of_a_run(make: Make, team: Team) -> None:
    """It goes away while the first stage works; the other stages run and end meanwhile."""
    wait = "touch begun.here; until test -e go.here; do sleep .1; done; "
    root = make(DIAMOND | {"a": stage(f"{wait} echo ${{x}} > a.txt", "a.txt", params=["x"])}, x=1)
    shutil.copy(ROOT / "pyproject.toml", root)  # how patient Prefect is
    flow = team.flow(root)
    until((root / "begun.here").exists)
    team.postgres.stop()
    (root / "go.here").touch()
    until((root / "d.txt").exists)
    assert not team.answers()
    time.sleep(AWAY)  # in which the flow wants to say that it ended
    team.postgres.start()
    assert flow.wait(240) == 0
    assert status(root) == {}
    until(lambda: newest(team) == ("Completed", ENDED))
    assert set(team.postgres.ask("select status from runs", "mlflow")) == {("FINISHED",)}


@pytest.fixture
def client(team: Team, clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """MLflow's client over HTTP, with the clone's bundle recorded. It tries nothing twice."""
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.mlflow)
    made = MlflowClient(team.mlflow)
    found = made.get_experiment_by_name("popen")
    experiment = found.experiment_id if found else made.create_experiment("popen")
    record(team.mlflow, made.create_run(experiment).info.run_id, clone / BUNDLE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield registry.connect(clone)
    mlflow.set_tracking_uri(before)


def test_postgres_restarted_at_any_step_of_a_promotion(client: MlflowClient, clone: Path, team: Team) -> None:
    """One version, one champion, the one before kept: whichever write met the outage."""
    old, outages = made_champion(client, clone, "start"), 0
    for writes in range(14):
        lock, count = f"lock {writes}", len(versions(client))
        interrupted: Any = Mortal(client, writes, team.postgres.stop)
        try:
            registry.promote(interrupted, new(interrupted, clone, lock), GOOD, champion(client), GATE)
        except (MlflowException, RegistryError):
            outages += 1
            team.postgres.start()
            until(team.answers)
            serving = aliases(client)[registry.CHAMPION]
            assert serving == old or registry.GATE in client.get_model_version(registry.NAME, serving).tags
        version = new(client, clone, lock)  # `retrain` again
        if aliases(client)[registry.CHAMPION] != str(version.version):
            assert registry.promote(client, version, GOOD, champion(client), GATE)
        assert len(versions(client)) == count + 1
        assert aliases(client) == {registry.CHAMPION: str(version.version), registry.PREVIOUS: old}
        assert client.get_registered_model(registry.NAME).tags == {}
        old = str(version.version)
    assert outages == 13  # as many writes as tests/promotion counts


def test_a_dump_brings_lost_databases_back(
    client: MlflowClient, clone: Path, team: Team, tmp_path: Path
) -> None:
    """With the commands of docs/operations.md; both services go on with what they find."""
    postgres = team.postgres
    made_champion(client, clone, "kept")
    team.ask("flows/", name="kept")
    before, kept = aliases(client), [version.tags for version in versions(client)]
    for name in ("prefect", "mlflow"):
        address, file = postgres.address(name), str(tmp_path / name)
        subprocess.run([postgres.programs / "pg_dump", "-Fc", "-f", file, address], check=True)
        postgres.ask(f"drop database {name} with (force)")
        postgres.ask(f"create database {name} owner popen")
        subprocess.run([postgres.programs / "pg_restore", "-d", address, file], check=True)
    until(team.answers)
    assert "kept" in {flow["name"] for flow in team.ask("flows/filter")}
    assert (aliases(client), [version.tags for version in versions(client)]) == (before, kept)
    assert registry.promote(client, new(client, clone, "after"), GOOD, champion(client), GATE)
    assert mlflow.pyfunc.load_model(f"models:/{registry.NAME}@{registry.CHAMPION}")
