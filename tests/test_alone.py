"""Two processes at the same work: the second waits for the end of the first, whatever ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Timer

import pytest

from popen.alone import alone

WORK, OTHER = "0123456789abcdef", "fedcba9876543210"


@contextmanager
def at_work(home: Path) -> Iterator[tuple[int, Event]]:
    """Another process that is at WORK until the event."""
    fork = get_context("fork")
    ready, leave = fork.Event(), fork.Event()

    def target() -> None:
        alone(home, WORK, lambda: None)
        ready.set()
        leave.wait()

    process = fork.Process(target=target)
    process.start()
    try:
        assert ready.wait(60)
        assert process.pid is not None
        yield process.pid, leave
    finally:
        process.kill()
        process.join()


def test_the_second_says_so_and_waits_for_the_first(tmp_path: Path) -> None:
    said = list[str]()
    with at_work(tmp_path) as (_, leave):

        def wait() -> None:
            said.append("waits")
            Timer(0.3, leave.set).start()

        alone(tmp_path, WORK, wait)
        assert said == ["waits"]
        assert leave.is_set()


def test_a_killed_process_is_waited_for_no_more(tmp_path: Path) -> None:
    with at_work(tmp_path) as (other, leave):
        alone(tmp_path, WORK, lambda: os.kill(other, signal.SIGKILL))
        assert not leave.is_set()


def test_other_work_and_ones_own_are_free(tmp_path: Path) -> None:
    def busy() -> None:
        pytest.fail("nobody else is at this work")

    with at_work(tmp_path):
        alone(tmp_path, OTHER, busy)
        alone(tmp_path, OTHER, busy)
        (tmp_path / "clone").mkdir()
        alone(tmp_path / "clone", WORK, busy)
