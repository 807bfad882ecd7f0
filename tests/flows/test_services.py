"""`make up` and `make down` on a small project: everything answers, runs, can be cancelled, is gone again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows import services
from flows.services import ServiceError
from popen.pipeline import process_name, state_folder
from tests.flows.conftest import stage, status

ROOT = Path(__file__).parents[2]
RETRAINING = "import time\nfrom prefect import flow\n\n\n@flow\ndef retrain() -> None:\n    time.sleep(15)\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_stage(root: Path, cmd: str) -> None:
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"a": stage(cmd, "a.txt")}}))


def until(condition: Callable[[], Any], patience: float = 60) -> Any:
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)
    return found


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


@pytest.fixture(autouse=True)
def _environment() -> None:
    """The module's fixture sets the environment, not that of each test."""


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
    answer = httpx.post(address, json=body) if body else httpx.get(address)
    return answer.raise_for_status().json()


def prefect(root: Path, *words: str) -> str:
    done = subprocess.run(["prefect", *words], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_on_demand(root: Path) -> str:
    """Start the deployment as the README says; the flow run's id."""
    return prefect(root, "deployment", "run", "pipeline/on-demand").split("UUID: ")[1].split()[0]


def state(run: str) -> str:
    return str(api(f"flow_runs/{run}")["state_name"])


def test_all_of_it_answers_on_loopback_alone(root: Path) -> None:
    ports = {int(os.environ["PREFECT_SERVER_API_PORT"]), int(os.environ["MLFLOW_PORT"])}
    listening = {
        (c.laddr.ip, c.laddr.port)
        for service in processes(root).values()
        for process in (service, *service.children(recursive=True))
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert {port for _, port in listening} >= ports
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert httpx.get(f"http://127.0.0.1:{os.environ['MLFLOW_PORT']}/").is_success


def test_a_second_up_changes_nothing(root: Path) -> None:
    before = processes(root)
    said = make(root, "up")
    assert before == processes(root)
    assert set(before) == {"server", "worker", "pages"}
    assert f"Prefect  http://127.0.0.1:{os.environ['PREFECT_SERVER_API_PORT']}\n" in said


def test_the_deployments_are_there(root: Path) -> None:
    assert api("deployments/name/pipeline/on-demand")["schedules"] == []
    nightly = api("deployments/name/retrain/nightly")
    assert [schedule["schedule"]["cron"] for schedule in nightly["schedules"]] == ["0 2 * * *"]
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def test_a_schedule_fires_and_the_slot_is_held(root: Path) -> None:
    """Seconds instead of nights: the second run finds the first at work and is cancelled."""
    deployment = api("deployments/name/retrain/nightly")["id"]

    def in_state(name: str) -> list[str]:
        runs = api("flow_runs/filter", deployments={"id": {"any_": [deployment]}})
        return [run["id"] for run in runs if run["state_name"] == name]

    prefect(root, "deployment", "schedule", "create", "retrain/nightly", "--interval", "5")
    until(lambda: in_state("Running") and in_state("Cancelled"), patience=120)
    (first,) = in_state("Running")
    prefect(root, "deployment", "schedule", "clear", "retrain/nightly", "--accept-yes")
    until(lambda: state(first) == "Completed", patience=120)


def messages(run: str) -> set[str]:
    return {log["message"] for log in api("logs/filter", logs={"flow_run_id": {"any_": [run]}})}


def test_a_deployment_runs_as_the_readme_says(root: Path) -> None:
    run = run_on_demand(root)
    until(lambda: state(run) == "Completed")
    assert status(root) == {}
    # the lines come in batches, the last of them after the state
    until(lambda: "> echo 1 > a.txt" in messages(run))


def test_a_cancelled_run_leaves_no_process(root: Path) -> None:
    write_stage(root, "touch begun.here; sleep 7775; echo 1 > a.txt")
    run = run_on_demand(root)
    until((root / "begun.here").exists)
    prefect(root, "flow-run", "cancel", run)
    until(lambda: state(run) == "Cancelled")
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "7775"]]
    (root / "begun.here").unlink()


def test_a_run_that_died_with_its_worker_is_closed_at_the_next_start(root: Path) -> None:
    write_stage(root, "touch begun.here; sleep 7776; echo 1 > a.txt")
    run = run_on_demand(root)
    until((root / "begun.here").exists)
    worker = processes(root)["worker"]
    family = [*worker.children(recursive=True), worker]
    for process in family:
        process.kill()
    psutil.wait_procs(family, 10)
    assert state(run) == "Running"
    assert f"flow run {run} was left by a dead worker" in make(root, "up")
    assert state(run) == "Crashed"
    write_stage(root, "echo 2 > a.txt")
    after = run_on_demand(root)
    until(lambda: state(after) == "Completed")


def test_a_port_that_is_taken_is_named_with_the_remedy(root: Path, tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    port = int(os.environ["PREFECT_SERVER_API_PORT"])
    remedy = rf"server cannot listen on 127.0.0.1:{port} .*PREFECT_SERVER_API_PORT={port + 10} make up"
    with pytest.raises(ServiceError, match=remedy):
        services.up(tmp_path)
    assert len(processes(root)) == 3
    assert not list(tmp_path.glob(".popen/service-*"))


def test_down_stops_what_up_started_and_nothing_else(root: Path, tmp_path: Path) -> None:
    alien = state_folder(tmp_path) / "service-server"
    alien.write_text(
        process_name().rpartition(":")[0] + ":1 http://127.0.0.1:1"
    )  # our own number, of an earlier process
    (tmp_path / "prefect.toml").write_text("[api]\n")
    assert services.down(tmp_path) == []
    assert (tmp_path / "prefect.toml").exists()
    started = [p for s in processes(root).values() for p in (s, *s.children(recursive=True))]
    assert len(started) >= 3
    assert "worker, pages, server" in make(root, "down")
    assert not [process for process in started if process.is_running()]
    assert not (root / "prefect.toml").exists()
    assert "nothing ran" in make(root, "down")
