"""A small project with its services up, for the tests that need `make up`: import the fixture `root`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.flows.conftest import stage
from tests.waiting import free_port

ROOT = Path(__file__).parents[2]
RETRAINING = """
import time
from pathlib import Path
from prefect import flow
from prefect.runtime import flow_run
from flows import orphans

@flow
def retrain() -> None:
    orphans.record(Path.cwd(), str(flow_run.id))
    while Path("hold.here").exists():
        time.sleep(0.1)
"""


def write_stage(root: Path, cmd: str) -> None:
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"a": stage(cmd, "a.txt")}}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Iterator[Path]:
    """A project with the flows and deployments of this one, its services up, on ports of their own."""
    folder = tmp_path_factory.mktemp("services")
    root = folder / "project"
    (root / ".dvc").mkdir(parents=True)
    site = f"[core]\n    analytics = false\n    site_cache_dir = {folder / 'site'}\n"
    (root / ".dvc/config").write_text(site)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for name in ("flows", "popen"):
        shutil.copytree(ROOT / name, root / name)
    (root / "flows/retraining.py").write_text(RETRAINING)  # it has tests of its own
    for name in ("prefect.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copy(records, root)
    write_stage(root, "echo 1 > a.txt")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MLFLOW_", "POPEN_", "DVC_", "PREFECT_API")):
                patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(folder / "home"))
        patch.setenv("PREFECT_SERVER_API_PORT", str(free_port()))
        patch.setenv("MLFLOW_PORT", str(free_port()))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        # the copy's code, and whatever else this process found on its path
        others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), *(p for p in others if Path(p) != ROOT)]))
        make(root, "up")
        yield root
        make(root, "down")


def make(root: Path, word: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows.services", word], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def processes(root: Path) -> dict[str, psutil.Process]:
    files = (root / ".popen").glob("service-*")
    return {f.name.removeprefix("service-"): psutil.Process(int(f.read_text().split(":")[1])) for f in files}


def api(path: str, **body: Any) -> Any:
    address = f"http://127.0.0.1:{os.environ['PREFECT_SERVER_API_PORT']}/api/{path}"
    answer = httpx.post(address, json=body, timeout=60) if body else httpx.get(address, timeout=60)
    return answer.raise_for_status().json()


def prefect(root: Path, *words: str) -> str:
    done = subprocess.run(["prefect", *words], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(root: Path, deployment: str = "pipeline/on-demand") -> str:
    """Start a deployment as the README says; the flow run's id."""
    return prefect(root, "deployment", "run", deployment).split("UUID: ")[1].split()[0]


def slots() -> int:
    """How many runs of `retrain` the server counts."""
    return int(api("deployments/name/retrain/nightly")["global_concurrency_limit"]["active_slots"])


def state(run: str) -> str:
    return str(api(f"flow_runs/{run}")["state_name"])


def messages(run: str) -> set[str]:
    return {log["message"] for log in api("logs/filter", logs={"flow_run_id": {"any_": [run]}})}
