"""The services of a team, for real, on loopback: PostgreSQL below Prefect's server and MLflow.

Debian: `apt install postgresql openssh-server`. What is not there skips its tests with a word.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.conftest import _environment, make, records
from tests.promotion.conftest import clone, weights
from tests.remote.servers import Postgres, postgres_programs, running
from tests.waiting import free_port, until

__all__ = ["_environment", "clone", "make", "records", "weights"]  # fixtures
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A running cluster without databases of ours."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL here: apt install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="popen-postgres-"))  # pytest's own are closed to other users
    try:
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
        server = Postgres(folder, programs)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Team:
    """Prefect's server and MLflow on PostgreSQL, and how a worker's machine knows them."""

    postgres: Postgres
    prefect: str
    mlflow: str
    environment: dict[str, str]

    def flow(self, root: Path, module: str = "flows.pipeline") -> subprocess.Popen[bytes]:
        """Start a flow in a clone."""
        command = [sys.executable, "-m", module]
        environment = os.environ | self.environment | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=root, env=environment)

    def ask(self, path: str, **body: Any) -> Any:
        """Prefect's API."""
        return httpx.post(f"{self.prefect}/{path}", json=body, timeout=60).raise_for_status().json()

    def answers(self) -> bool:
        """Whether both services can work, with their databases."""
        try:
            return all(
                httpx.request(method, address, json=body, timeout=60).is_success
                for method, address, body in (
                    ("POST", f"{self.prefect}/flows/filter", {}),
                    ("POST", f"{self.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 1}),
                )
            )
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def team(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """As docs/operations.md starts them."""
    folder = tmp_path_factory.mktemp("team")
    postgres.ask("create role popen login password 'secret'")
    for name in ("prefect", "mlflow"):
        postgres.ask(f"create database {name} owner popen")
    ports = free_port(), free_port()
    mlflow = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports[1])]
    mlflow += ["--workers", "1", "--backend-store-uri", postgres.address("mlflow")]
    mlflow += ["--artifacts-destination", str(folder / "mlartifacts")]
    prefect = [sys.executable, "-m", "prefect", "server", "start"]
    environment = {
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{ports[0]}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports[1]}",
    }
    database = postgres.address("prefect", "postgresql+asyncpg")
    with (
        running(mlflow, folder, folder / "mlflow.txt"),
        running(
            prefect,
            folder,
            folder / "prefect.txt",
            PREFECT_HOME=str(folder / "home"),
            PREFECT_SERVER_API_PORT=str(ports[0]),
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_API_DATABASE_CONNECTION_URL=database,
        ),
    ):
        made = Team(postgres, environment["PREFECT_API_URL"], environment["MLFLOW_TRACKING_URI"], environment)
        until(made.answers)
        yield made
