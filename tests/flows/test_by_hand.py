from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.by_hand import by_hand
from flows.pipeline import main
from flows.stage_process import StageStopped
from popen.promotion.gate import GateError
from tests.flows.conftest import Make, stage

pytestmark = pytest.mark.slow

LEVEL = "import logging; import prefect.main; print(logging.getLogger('prefect.server').level)"


def test_a_server_that_prefect_starts_for_the_run_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("PREFECT_SERVER_LOGGING_LEVEL")  # so that what the run sets is taken back
    assert by_hand(lambda: subprocess.check_output([sys.executable, "-c", LEVEL])) == b"50\n"


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


def test_a_failed_run_ends_with_one_line(make: Make, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make({"a": stage("false", "a.txt")}))
    monkeypatch.setattr(sys, "argv", ["flows.pipeline"])
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")  # so that it is taken back
    with pytest.raises(SystemExit, match=r"^error: failed: a\. The log of each task has its last lines$"):
        main()
