"""MLflow's server away for a while, killed outright and started again, in the middle of flows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from mlflow.tracking import MlflowClient
from prefect import State, flow

from flows.retraining import champion
from tests.flows.conftest import Make, stage
from tests.flows.test_pipeline import Start, start, tasks
from tests.waiting import free_port, until

__all__ = ["start"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]
AWAY = 20.0  # seconds
LOGS = """
import time
from pathlib import Path
from popen.tracking import Tracker

tracker = Tracker(Path.cwd(), "a", {"x": 1}, {"t": "1"})
tracker.log_metrics({"loss": 1.0}, 0)
Path("begun.here").touch()
while not Path("gone.here").exists():
    time.sleep(0.1)
tracker.log_metrics({"loss": 0.5}, 1)
Path("a.txt").write_text("1")
tracker.log_artifact(Path("a.txt"))
tracker.set_tags({"late": "yes"})
tracker.close("FINISHED")
"""


class Server:
    """A real MLflow server on a database of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--backend-store-uri", "sqlite:///mlflow.db"],
            cwd=self.folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health").is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture
def mlflow(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that does not run yet, where all records go."""
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/mlflow.db").write_bytes(records.read_bytes())
    server = Server(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    yield server
    server.kill()


def test_nothing_is_lost_when_it_is_away_at_the_end_of_a_stage_and_of_the_flow(
    mlflow: Server, make: Make, start: Start
) -> None:
    root = make({"a": stage("python logs.py", "a.txt", "logs.py")})
    (root / "logs.py").write_text(LOGS)
    mlflow.begin()
    until(mlflow.answers)

    def outage() -> None:
        until((root / "begun.here").exists)
        mlflow.kill()
        (root / "gone.here").touch()
        time.sleep(AWAY)
        mlflow.begin()

    thread = threading.Thread(target=outage)
    thread.start()
    state = start(root)
    thread.join(60)
    until(mlflow.answers)
    assert state.result() == {"a": "ran"}
    client = MlflowClient(mlflow.address)
    experiment = client.get_experiment_by_name("popen")
    assert experiment is not None
    parent, child = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.data.params, child.data.tags["late"]) == ({"x": "1"}, "yes")
    history = client.get_metric_history(child.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(0, 1.0), (1, 0.5)]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["a.txt"]


@flow
def ask(home: Path) -> Any:
    return champion(home)


def test_retraining_waits_for_it(mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)  # MLflow's own take minutes
    threading.Timer(3.0, mlflow.begin).start()
    state = cast(State[Any], ask(tmp_path, return_state=True))
    assert state.result() is None  # there is no champion yet
    assert tasks(state)["champion"]["run_count"] > 1
