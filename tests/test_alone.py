"""Two stages at the same work: the second waits for the end of the first, whatever ends it; with all its
processes, where it is several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Timer

import psutil
import pytest

from popen.alone import alone
from tests.processes import at_work

ROOT = Path(__file__).parents[1]
WORK, OTHER = "0123456789abcdef", "fedcba9876543210"
FOLDER = Path("where it is kept")
# two processes as torchrun starts them: each says that it begins, that it waits, and where it then works
PROCESS = f"""
import os, sys
from pathlib import Path
from popen.alone import alone
from popen.stages.run import _catch_signals

home, rank = Path(sys.argv[1]), os.environ["RANK"]
_catch_signals()
(home / f"begun-{{rank}}").write_text(str(os.getpid()))
(home / f"done-{{rank}}").write_text(
    str(alone(home, {WORK!r}, home / f"kept by {{rank}}", lambda: (home / f"waits-{{rank}}").touch()))
)
"""


def working(home: Path) -> AbstractContextManager[tuple[int, Event]]:
    """Another process that is at WORK until the event."""
    return at_work(lambda: alone(home, WORK, FOLDER, lambda: None))


def test_the_second_says_so_and_waits_for_the_first(tmp_path: Path) -> None:
    said = list[str]()
    with working(tmp_path) as (_, leave):

        def wait() -> None:
            said.append("waits")
            Timer(0.3, leave.set).start()

        assert alone(tmp_path, WORK, FOLDER, wait) == FOLDER
        assert said == ["waits"]
        assert leave.is_set()


def test_a_killed_process_is_waited_for_no_more(tmp_path: Path) -> None:
    with working(tmp_path) as (other, leave):
        alone(tmp_path, WORK, FOLDER, lambda: os.kill(other, signal.SIGKILL))
        assert not leave.is_set()


def test_other_work_and_ones_own_are_free(tmp_path: Path) -> None:
    def busy() -> None:
        pytest.fail("nobody else is at this work")

    with working(tmp_path):
        alone(tmp_path, OTHER, FOLDER, busy)
        alone(tmp_path, OTHER, FOLDER, busy)
        (tmp_path / "clone").mkdir()
        alone(tmp_path / "clone", WORK, FOLDER, busy)


def launched(home: Path) -> subprocess.Popen[bytes]:
    """A stage that is two processes comes to WORK in `home`."""
    for left in home.glob("*-[01]"):
        left.unlink()
    (home / "process.py").write_text(PROCESS)
    words = [sys.executable, "-m", "popen.launch", "2", "process", str(home)]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": f"{ROOT}:{home}"})


def ranks(home: Path, what: str) -> list[str]:
    return sorted(path.name.removeprefix(f"{what}-") for path in home.glob(f"{what}-*"))


def until_it_waits(home: Path, stage: subprocess.Popen[bytes]) -> None:
    """Both processes have begun, and the main one waits for the other stage."""
    deadline = time.monotonic() + 240
    while not (ranks(home, "begun") == ["0", "1"] and ranks(home, "waits") == ["0"]):
        assert stage.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # in which a helper that does not wait would have gone on


def test_the_helpers_of_a_stage_wait_with_its_main_process(tmp_path: Path) -> None:
    """They work in its folder; and what an earlier start left does not let them through."""
    assert launched(tmp_path).wait(240) == 0
    assert ranks(tmp_path, "done") == ["0", "1"]
    assert ranks(tmp_path, "waits") == []
    with working(tmp_path) as (_, leave):
        stage = launched(tmp_path)
        until_it_waits(tmp_path, stage)
        assert ranks(tmp_path, "done") == []
        leave.set()
        assert stage.wait(240) == 0
    assert {(tmp_path / f"done-{rank}").read_text() for rank in (0, 1)} == {str(tmp_path / "kept by 0")}
    assert len(list((tmp_path / ".popen").glob("launch-*"))) == 1  # that of the first is swept up


@pytest.mark.parametrize("killed", ["the main process", "what started it"])
def test_helpers_that_wait_end_with_the_main_process(tmp_path: Path, killed: str) -> None:
    with working(tmp_path):
        stage = launched(tmp_path)
        until_it_waits(tmp_path, stage)
        both = [psutil.Process(int((tmp_path / f"begun-{rank}").read_text())) for rank in (0, 1)]
        (stage if killed == "what started it" else both[0]).kill()
        assert stage.wait(60) != 0
        deadline = time.monotonic() + 30
        while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in both):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert ranks(tmp_path, "done") == []
