"""`make up` and `make down` on a small project: everything answers, runs, can be cancelled, is gone again."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import psutil
import pytest

from flows import services
from flows.services import ServiceError
from popen.pipeline import process_name, state_folder
from tests.flows.conftest import status
from tests.flows.up import api, make, messages, prefect, processes, root, start, state, write_stage
from tests.waiting import until

pytestmark = pytest.mark.slow

__all__ = ["root"]  # a fixture


@pytest.fixture(autouse=True)
def _environment() -> None:
    """The module's fixture sets the environment, not that of each test."""


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
    assert httpx.get(f"http://127.0.0.1:{os.environ['MLFLOW_PORT']}/", timeout=60).is_success


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

    (root / "hold.here").touch()
    prefect(root, "deployment", "schedule", "create", "retrain/nightly", "--interval", "5")
    until(lambda: in_state("Running") and in_state("Cancelled"))
    (first,) = in_state("Running")
    prefect(root, "deployment", "schedule", "clear", "retrain/nightly", "--accept-yes")
    (root / "hold.here").unlink()
    until(lambda: state(first) == "Completed")


def test_a_deployment_runs_as_the_readme_says(root: Path) -> None:
    run = start(root)
    until(lambda: state(run) == "Completed")
    assert status(root) == {}
    # the lines come in batches, the last of them after the state
    until(lambda: "> echo 1 > a.txt" in messages(run))


def test_a_cancelled_run_leaves_no_process(root: Path) -> None:
    write_stage(root, "touch begun.here; sleep 7775; echo 1 > a.txt")
    run = start(root)
    until((root / "begun.here").exists)
    prefect(root, "flow-run", "cancel", run)
    until(lambda: state(run) == "Cancelled")
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "7775"]]
    (root / "begun.here").unlink()


def test_a_port_that_is_taken_is_named_with_the_remedy(root: Path, tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    port = int(os.environ["PREFECT_SERVER_API_PORT"])
    remedy = rf"server cannot listen on 127.0.0.1:{port} .*PREFECT_SERVER_API_PORT={port + 10} make up"
    with pytest.raises(ServiceError, match=remedy):
        services.up(tmp_path)
    assert len(processes(root)) == 3
    assert not list(tmp_path.glob(".popen/service-*"))


def test_what_another_machine_started_is_left_alone(tmp_path: Path) -> None:
    """Its number means another process here: a strange one, which was ended."""
    (tmp_path / ".dvc").mkdir()
    ours = process_name()
    file = state_folder(tmp_path) / "service-worker"
    file.write_text(f"elsewhere:{ours.partition(':')[2]} http://127.0.0.1:1")
    for call in (services.down, services.up):
        with pytest.raises(ServiceError, match=f"started on the machine elsewhere: .*remove {file}"):
            call(tmp_path)
    assert file.exists()


def test_a_server_of_mlflows_has_pages_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    assert services.services(tmp_path)[2] is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert services.services(tmp_path)[2] is not None


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
