"""Two workers, each run in a clone of its own: `prefect.remote.yaml` as it is, over git, and one remote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.conftest import Make, commit, stage
from tests.remote.conftest import ROOT
from tests.remote.servers import running
from tests.remote.test_storage import Remote, s3, sharing
from tests.waiting import until

pytestmark = pytest.mark.slow

PREFECT = [sys.executable, "-m", "prefect"]
OURS = "mlflow run of this repository"


class Workers:
    """Prefect's commands and API, as they are on the workers' machines."""

    def __init__(self, server: str, environment: dict[str, str]) -> None:
        self.server = server
        self.environment = os.environ | environment | {"PREFECT_API_URL": server}

    def prefect(self, folder: Path, *words: str) -> str:
        command = [*PREFECT, *words]
        done = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def worker(self, folder: Path, machine: str) -> AbstractContextManager[object]:
        """A worker that takes one run at a time, in a folder of its own."""
        (folder / machine).mkdir()
        words = ["worker", "start", "--pool", "popen", "--type", "process", "--limit", "1", "--name", machine]
        environment = self.environment | {"MACHINE": machine}
        return running([*PREFECT, *words], folder / machine, folder / f"{machine}.txt", **environment)

    def run(self, folder: Path, **parameters: Any) -> str:
        """Start the deployment; the flow run's id."""
        words = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
        said = self.prefect(folder, "deployment", "run", "pipeline/on-demand", *words)
        return said.split("UUID: ")[1].split()[0]

    def ended(self, run: str) -> bool:
        found = httpx.get(f"{self.server}/flow_runs/{run}", timeout=60).raise_for_status().json()
        assert found["state_type"] not in ("FAILED", "CRASHED"), found["state"]["message"]
        return bool(found["state_type"] == "COMPLETED")

    def tasks(self, run: str) -> dict[str, str]:
        only = {"flow_runs": {"id": {"any_": [run]}}}
        found = httpx.post(f"{self.server}/task_runs/filter", json=only, timeout=60).raise_for_status().json()
        return {task["name"]: task["state_name"] for task in found}


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    made = s3(tmp_path)
    yield made
    made.server.stop()


def test_what_one_worker_has_computed_another_restores(
    make: Make, server: str, remote: Remote, tmp_path: Path
) -> None:
    cmd = (
        f"echo $MACHINE >> {tmp_path}/{{0}}; until test -s {tmp_path}/{{1}}; do sleep .1; done; "
        "echo 1 > {0}.txt"
    )
    stages = {one: stage(cmd.format(one, other), f"{one}.txt", params=["x"]) for one, other in ("ab", "ba")}
    origin = sharing(make(stages, x=1), remote)
    for name in ("flows", "popen"):
        shutil.copytree(ROOT / name, origin / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.remote.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, origin)
    code = origin / "flows/parent_run.py"  # other than what is installed here
    code.write_text(code.read_text().replace('"mlflow run"', f'"{OURS}"'))
    commit(origin)

    records = {"MLFLOW_TRACKING_URI": f"sqlite:///{shutil.copy(origin / 'mlflow.db', tmp_path)}"}
    here = {"POPEN_REPOSITORY": origin.as_uri(), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    workers = Workers(server, remote.environment | records | here)
    workers.prefect(origin, "work-pool", "create", "popen", "--type", "process")
    workers.prefect(origin, "--no-prompt", "deploy", "--prefect-file", "prefect.remote.yaml", "--all")
    with workers.worker(tmp_path, "one"), workers.worker(tmp_path, "two"):
        both = [workers.run(tmp_path, targets=[name]) for name in "ab"]  # each waits for the other
        until(lambda: all(workers.ended(run) for run in both))
        again = workers.run(tmp_path)
        until(lambda: workers.ended(again))
    assert {(tmp_path / name).read_text() for name in "ab"} == {"one\n", "two\n"}  # each stage ran once
    states = {"a": "Restored", "b": "Restored", "pull": "Completed", "push": "Completed"}
    until(lambda: workers.tasks(again) == states | {OURS: "Completed"})
