"""Services, flows and workers that are killed while runs are at work: no run is lost, none stays open."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from flows.services import PATIENCE
from tests.flows.conftest import status
from tests.flows.up import api, make, prefect, processes, root, slots, start, state, write_stage
from tests.waiting import until

pytestmark = pytest.mark.slow

__all__ = ["root"]  # a fixture
WAITS = "import pathlib, time\nwhile pathlib.Path('late.here').exists():\n    time.sleep(0.1)\n"
NO_WORKER = """
import os, sys, time
if "worker" in sys.orig_argv:
    print("no worker here", flush=True)
    time.sleep(3)
    os._exit(1)
"""
HELD = "touch begun.here; while test -e hold.here; do sleep .1; done; echo {0} > a.txt"


@pytest.fixture(autouse=True)
def _environment(root: Path) -> Iterator[None]:
    """The module's fixture sets the environment; each test begins with all services."""
    make(root, "up")
    (root / "hold.here").touch()
    yield
    for name in ("begun.here", "hold.here", "late.here"):
        (root / name).unlink(missing_ok=True)


def held_run(root: Path, result: int) -> str:
    """A run of the deployment whose stage is at work until hold.here is gone."""
    write_stage(root, HELD.format(result))
    run = start(root)
    until((root / "begun.here").exists)
    return run


def kill(*killed: psutil.Process) -> None:
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child may have ended by itself
            process.kill()
    psutil.wait_procs(killed, 10)


def family(process: psutil.Process) -> list[psutil.Process]:
    return [*process.children(recursive=True), process]


def renewed(lease: str) -> int:
    """What the server says when the holder of a slot says that it is still at work."""
    address = f"http://127.0.0.1:{os.environ['PREFECT_SERVER_API_PORT']}/api/v2/concurrency_limits/leases"
    return httpx.post(f"{address}/{lease}/renew", json={"lease_duration": 300}, timeout=60).status_code


def test_runs_go_on_when_the_server_is_killed_and_started_again(root: Path) -> None:
    run = held_run(root, 1)
    nightly = start(root, "retrain/nightly")
    until(lambda: state(nightly) == "Running")
    slot = api(f"flow_runs/{nightly}")["state"]["state_details"]["deployment_concurrency_lease_id"]
    before = processes(root)
    kill(*family(before["server"]))
    make(root, "up")
    after = processes(root)
    assert after["server"] != before["server"]
    assert after["pages"] == before["pages"]
    # a slot that the server has forgotten would stop the run at its next renewal, minutes later
    assert renewed(slot) == 204
    assert (state(run), state(nightly)) == ("Running", "Running")
    (root / "hold.here").unlink()
    until(lambda: (state(run), state(nightly)) == ("Completed", "Completed"))
    assert status(root) == {}
    until(lambda: slots() == 0)
    later = start(root)  # the worker has found the server again
    until(lambda: state(later) == "Completed")


def test_a_run_that_could_not_tell_its_end_is_closed_at_the_next_start(root: Path) -> None:
    write_stage(root, HELD.format(2))
    url = f"http://127.0.0.1:{os.environ['PREFECT_SERVER_API_PORT']}/api"
    known = set((root / ".popen").glob("flow-*"))
    # it asks a server that does not answer for a minute; this one for 14 s, so that the test is shorter.
    # Not at all would be too little: a busy server says 503 now and then, and the run would not begin
    environment = os.environ | {"PREFECT_API_URL": url, "PREFECT_CLIENT_MAX_RETRIES": "3"}
    flow = subprocess.Popen([sys.executable, "-m", "flows.pipeline"], cwd=root, env=environment)
    until(lambda: (root / "begun.here").exists() or flow.poll() is not None)
    (note,) = set((root / ".popen").glob("flow-*")) - known
    run = note.name.removeprefix("flow-")
    kill(*family(processes(root)["server"]))
    (root / "hold.here").unlink()
    assert flow.wait(120) != 0
    assert f"flow run {run} was left" in make(root, "up")
    assert state(run) == "Crashed"
    assert not note.exists()
    assert status(root) == {}  # what it computed is there


def test_a_run_outlives_its_worker(root: Path) -> None:
    run = held_run(root, 3)
    kill(processes(root)["worker"])
    assert run not in make(root, "up")
    assert state(run) == "Running"
    (root / "hold.here").unlink()
    until(lambda: state(run) == "Completed")
    assert status(root) == {}
    later = start(root)
    until(lambda: state(later) == "Completed")


def test_a_worker_that_does_not_start_is_told_though_the_server_has_just_heard_of_the_one_before(
    root: Path, tmp_path: Path
) -> None:
    kill(*family(processes(root)["worker"]))
    (tmp_path / "sitecustomize.py").write_text(NO_WORKER)
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    up, began = [sys.executable, "-m", "flows.services", "up"], time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        done = subprocess.run(up, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "the worker did not start" in done.stderr
    assert time.monotonic() - began < PATIENCE  # its end is noticed
    assert "no worker here" in done.stderr
    assert set(processes(root)) == {"server", "pages"}  # what ran before goes on


def test_a_run_that_died_with_its_worker_is_closed_at_the_next_start(root: Path) -> None:
    run, nightly = held_run(root, 4), start(root, "retrain/nightly")
    until(lambda: (root / f".popen/flow-{nightly}").exists())
    kill(*family(processes(root)["worker"]))
    assert (state(run), state(nightly), slots()) == ("Running", "Running", 1)
    said = make(root, "up")
    for one in (run, nightly):
        assert f"flow run {one} was left by a dead worker" in said
        assert state(one) == "Crashed"
    assert slots() == 0  # or the next nights would find the slot taken
    (root / "hold.here").unlink()
    after = start(root)
    until(lambda: state(after) == "Completed")
    assert status(root) == {}


def test_a_run_that_a_dead_worker_had_only_taken_is_closed_too(root: Path) -> None:
    write_stage(root, HELD.format(5))
    waits = (
        "import time\nfrom pathlib import Path\n\nwhile Path('late.here').exists():\n    time.sleep(0.1)\n"
    )
    (root / "flows/__init__.py").write_text(waits)
    (root / "late.here").touch()  # its process begins and comes no further than its first import
    run, cancelled = start(root), start(root)
    worker = processes(root)["worker"]
    until(lambda: {api(f"flow_runs/{one}")["state_type"] for one in (run, cancelled)} == {"PENDING"})
    until(lambda: len(family(worker)) > 2)  # one that comes into being meanwhile would live and run
    kill(*family(worker))
    (root / "late.here").unlink()
    prefect(root, "flow-run", "cancel", cancelled)
    assert [api(f"flow_runs/{one}")["state_type"] for one in (run, cancelled)] == ["PENDING", "CANCELLING"]
    said = make(root, "up")
    for one in (run, cancelled):
        assert f"flow run {one} was left by a dead worker" in said
        assert state(one) == "Crashed"
    assert not (root / "begun.here").exists()
