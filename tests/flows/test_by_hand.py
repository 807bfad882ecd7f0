from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from requests.utils import should_bypass_proxies

from flows.by_hand import by_hand, spare_loopback
from flows.pipeline import main
from flows.stage_process import StageStopped
from popen.promotion.gate import GateError
from tests.flows.conftest import Make, stage
from tests.waiting import until

pytestmark = pytest.mark.slow

SERVER = "http://127.0.0.1:4200/api"
LEVEL = "import logging; import prefect.main; print(logging.getLogger('prefect.server').level)"


def test_a_server_that_prefect_starts_for_the_run_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("PREFECT_SERVER_LOGGING_LEVEL")  # so that what the run sets is taken back
    assert by_hand(lambda: subprocess.check_output([sys.executable, "-c", LEVEL])) == b"50\n"


@pytest.mark.parametrize("named", ["NO_PROXY", "no_proxy"])
def test_what_runs_on_this_machine_is_asked_without_a_proxy(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the user asks without one still is: where both variables are there, clients read one alone."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    monkeypatch.setenv(named, "near.invalid")
    assert not should_bypass_proxies(SERVER, None)
    for _ in range(2):
        spare_loopback()
        for name in ("NO_PROXY", "no_proxy"):
            assert os.environ[name] == "near.invalid,127.0.0.1,localhost"
    for url in (SERVER, "http://localhost:5000", "http://near.invalid"):
        assert should_bypass_proxies(url, None)  # MLflow's client
    assert not should_bypass_proxies("http://far.invalid", None)


@pytest.mark.parametrize(
    "error", [GateError("gate.benchmark: muse_val is not evaluated"), StageStopped("no")]
)
def test_what_is_written_to_be_read_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")  # so that it is taken back
    with pytest.raises(SystemExit, match=f"^error: {error}$"):
        by_hand(fails)
    monkeypatch.setenv("POPEN_DEBUG", "1")
    with pytest.raises(type(error)):
        by_hand(fails)


def test_outside_of_a_clone_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*: not inside a clone of the project"):
        by_hand(lambda: None)


def test_a_server_that_is_gone_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reboot `prefect.toml` names it still; Prefect's own error is pages of stack traces."""
    root = make({"a": stage("touch a.txt", "a.txt")})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    (root / "prefect.toml").write_text(f'[api]\nurl = "http://127.0.0.1:{port}/api"\n')
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")  # so that it is taken back
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit, match=rf"^error: Prefect's server .*:{port}/api, .*`make up` starts it"):
        by_hand(lambda: None)
    monkeypatch.setenv("PREFECT_API_URL", SERVER)
    assert by_hand(lambda: 3) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_killed_takes_its_server_along(
    make: Make, tmp_path: Path, number: signal.Signals
) -> None:
    root = make({"a": stage("touch begun.here; exec sleep 7776", "a.txt")})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    flow = subprocess.Popen([sys.executable, "-m", "flows.pipeline"], cwd=root, env=environment)
    until(lambda: (root / "begun.here").exists() or flow.poll() is not None)
    children = psutil.Process(flow.pid).children(recursive=True)
    assert any("uvicorn" in child.cmdline() for child in children)
    flow.send_signal(number)
    assert flow.wait(120) == 128 + number
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_failed_run_ends_with_one_line(make: Make, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make({"a": stage("false", "a.txt")}))
    monkeypatch.setattr(sys, "argv", ["flows.pipeline"])
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")  # so that it is taken back
    with pytest.raises(SystemExit, match=r"^error: failed: a\. The log of each task has its last lines$"):
        main()
