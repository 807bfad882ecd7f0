"""Databases that an older MLflow and Prefect made, brought up to date as docs/operations.md says.

The older ones live in an environment of their own, which needs the package registry and a minute:

    python -m venv OLD
    OLD/bin/pip install mlflow==2.22.5 prefect==3.4.25 fastapi==0.116.1 "sqlalchemy<2.1" psycopg2-binary
    POPEN_OLD_PYTHON=OLD/bin/python pytest tests/remote/test_upgrade.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from popen.promotion import registry
from tests.remote.servers import Postgres

OLD = os.environ.get("POPEN_OLD_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OLD, reason="no older MLflow and Prefect: see the head of this file"),
]
TAGS = {"git.commit": "c" * 40, "data": "d" * 32, "params": "{}", "figures": "{}"}
MODEL = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Model(PythonModel):
    def predict(self, context, model_input, params=None):
        return [len(model_input)]

set_model(Model())
"""
RECORDS = """
import json, sys, mlflow
from mlflow.tracking import MlflowClient
uri, folder, tags = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
mlflow.set_tracking_uri(uri)
client = MlflowClient(uri)
mlflow.set_experiment(experiment_id=client.create_experiment("popen", artifact_location=folder))
client.create_registered_model("popen")
for number in "12":
    with mlflow.start_run(run_name="calibrate", tags={"stage": "calibrate"}) as run:
        mlflow.log_metric("loss", 0.5, step=3)
        model = mlflow.pyfunc.log_model(artifact_path="popen", python_model="model.py", pip_requirements=[])
    gate = {"passed": True, "checks": [], "against": None if number == "1" else "1"}
    own = {"dvc.lock": number * 32, "gate": json.dumps(gate)}
    client.create_model_version("popen", model.model_uri, run.info.run_id, tags=tags | own)
client.set_registered_model_alias("popen", "champion", "2")
client.set_registered_model_alias("popen", "previous", "1")
print(mlflow.__version__)
"""
FLOW = """
import prefect

@prefect.flow(flow_run_name="made before")
def old(): return prefect.__version__

print(old())
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def addresses(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Empty databases for both, on one machine and in a team."""
    if request.param == "sqlite":
        yield {
            "mlflow": f"sqlite:///{tmp_path}/mlflow.db",
            "prefect": f"sqlite+aiosqlite:///{tmp_path}/prefect.db",
        }
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    postgres.ask("create role popen login password 'secret'")
    for name in ("mlflow", "prefect"):
        postgres.ask(f"create database {name} owner popen")
    yield {
        "mlflow": postgres.address("mlflow"),
        "prefect": postgres.address("prefect", "postgresql+asyncpg"),
    }
    for name in ("mlflow", "prefect"):
        postgres.ask(f"drop database {name} with (force)")
    postgres.ask("drop role popen")


def run(python: str, folder: Path, *words: str, **environment: str) -> str:
    """A Python's output in a folder where neither our code nor our settings are found."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([python, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def _tracking() -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.mark.usefixtures("_tracking")
def test_the_registry_of_an_older_mlflow(
    addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = addresses["mlflow"]
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / ".dvc").mkdir()
    artifacts = (tmp_path / "mlartifacts").as_uri()
    made = run(OLD, tmp_path, "-c", RECORDS, uri, artifacts, json.dumps(TAGS | {"bundle": "b" * 32}))
    assert made.split()[-1] != mlflow.__version__
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run(sys.executable, tmp_path, "-m", "mlflow", "db", "upgrade", uri)
    client = registry.connect(tmp_path)
    assert registry.aliases(client) == {registry.CHAMPION: "2", registry.PREVIOUS: "1"}
    first, second = registry.versions(client)
    assert second.tags.items() >= TAGS.items()
    assert client.get_metric_history(str(first.run_id), "loss")[0].step == 3
    monkeypatch.chdir(tmp_path)
    lines = subprocess.run(
        ["popen", "models"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", "champion"], ["1", "previous"]]
    assert registry.rollback(client) == ("1", "2")
    served = mlflow.pyfunc.load_model(f"models:/{registry.NAME}@{registry.CHAMPION}")
    assert served.predict(pd.DataFrame({"x": [1, 2, 3]})) == [3]


def test_the_runs_of_an_older_prefect(addresses: dict[str, str], tmp_path: Path) -> None:
    place = {
        "PREFECT_API_DATABASE_CONNECTION_URL": addresses["prefect"],
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    made = run(OLD, tmp_path, "-c", FLOW, **place).split()[-1]
    prefect = ["-m", "prefect"]
    assert made not in run(sys.executable, tmp_path, *prefect, "version")
    run(sys.executable, tmp_path, *prefect, "server", "database", "upgrade", "-y", **place)
    # the server would do the same at its start; here it must find nothing to do
    closed = place | {"PREFECT_API_DATABASE_MIGRATE_ON_START": "false"}
    (found,) = json.loads(run(sys.executable, tmp_path, *prefect, "flow-run", "ls", "-o", "json", **closed))
    assert (found["name"], found["state"]["name"]) == ("made before", "Completed")
