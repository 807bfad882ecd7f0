"""Two processes at the same work: the second waits for the end of the first, whatever ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from popen.alone import alone

WORK, OTHER = "0123456789abcdef", "fedcba9876543210"


@contextmanager
def at_work(home: Path, seconds: float) -> Iterator[int]:
    """Another process that is at WORK for a while."""
    fork = get_context("fork")
    ready = fork.Event()

    def target() -> None:
        alone(home, WORK, lambda: None)
        ready.set()
        time.sleep(seconds)

    process = fork.Process(target=target)
    process.start()
    try:
        assert ready.wait(30)
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def test_the_second_says_so_and_waits_for_the_first(tmp_path: Path) -> None:
    said: list[float] = []
    with at_work(tmp_path, 1.0) as other:
        alone(tmp_path, WORK, lambda: said.append(time.monotonic()))
        assert len(said) == 1
        assert time.monotonic() - said[0] > 0.2
        os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)  # it has come to its end


def test_a_killed_process_is_waited_for_no_more(tmp_path: Path) -> None:
    with at_work(tmp_path, 600) as other:
        alone(tmp_path, WORK, lambda: os.kill(other, signal.SIGKILL))


def test_other_work_and_ones_own_are_free(tmp_path: Path) -> None:
    def busy() -> None:
        pytest.fail("nobody else is at this work")

    with at_work(tmp_path, 600):
        alone(tmp_path, OTHER, busy)
        alone(tmp_path, OTHER, busy)
        (tmp_path / "clone").mkdir()
        alone(tmp_path / "clone", WORK, busy)
