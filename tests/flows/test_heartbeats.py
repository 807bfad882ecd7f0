"""Runs that died with their machine are closed by the server; those that are only long are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import heartbeats
from tests.flows.test_service_faults import HELD, WAITS, family, kill
from tests.flows.up import api, processes, root, slots, start, state, write_stage
from tests.remote.servers import running
from tests.waiting import until

pytestmark = pytest.mark.slow

__all__ = ["root"]  # a fixture
BEAT, SILENCE = 30, 40  # seconds; Prefect sends no more often


@pytest.fixture(scope="module", autouse=True)
def _often() -> Iterator[None]:
    """For the runs of the worker, too, which `root` starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(BEAT))
        yield


@pytest.fixture(autouse=True)
def _environment() -> None:
    """The module's fixture sets the environment, not that of each test."""


def test_the_server_closes_silent_runs_and_no_others(root: Path) -> None:
    (automation,) = api("automations/filter", limit=10)  # `make up` made it
    assert automation["trigger"]["within"] == heartbeats.SILENCE.total_seconds()
    subprocess.run([sys.executable, "-m", "flows.heartbeats"], cwd=root, check=True)
    server = f"http://127.0.0.1:{os.environ['PREFECT_SERVER_API_PORT']}/api"
    with temporary_settings({PREFECT_API_URL: server}):
        heartbeats.watch(timedelta(seconds=SILENCE))
    (changed,) = api("automations/filter", limit=10)
    assert (changed["id"], changed["trigger"]["within"]) == (automation["id"], SILENCE)

    write_stage(root, HELD.format(1))
    (root / "hold.here").touch()
    with running([sys.executable, "-m", "flows.pipeline"], root, root / "long.here") as long:
        until((root / "begun.here").exists)
        began = time.monotonic()
        (note,) = (root / ".popen").glob("flow-*")
        alive = note.name.removeprefix("flow-")
        dead = start(root, "retrain/nightly")
        until(lambda: state(dead) == "Running")
        (root / "flows/__init__.py").write_text(WAITS)
        (root / "late.here").touch()  # its process begins and comes no further than its first import
        taken = start(root)
        until(lambda: api(f"flow_runs/{taken}")["state_type"] == "PENDING")
        kill(*family(processes(root)["worker"]))
        (root / "late.here").unlink()
        assert slots() == 1

        until(lambda: {api(f"flow_runs/{run}")["state_type"] for run in (dead, taken)} == {"CRASHED"})
        assert "Nothing was heard of it for 40 s" in api(f"flow_runs/{dead}")["state"]["message"]
        until(lambda: slots() == 0)
        time.sleep(max(0.0, began + SILENCE + 15 - time.monotonic()))  # it lives by its second heartbeat
        assert state(alive) == "Running"
        long.send_signal(signal.SIGSTOP)  # cut off, and back again
        until(lambda: state(alive) == "Crashed")
        long.send_signal(signal.SIGCONT)
        (root / "hold.here").unlink()
        assert long.wait(120) == 0
        assert state(alive) == "Completed"
