"""Several processes that train together, as torchrun would start them."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch


def _process(work: Callable[[], Any], rank: int, count: int, folder: Path, grouped: bool) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this was forked from
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    if grouped:
        address = f"file://{folder}/rendezvous"  # no port that another test might take
        torch.distributed.init_process_group(
            "gloo", address, timedelta(seconds=300), rank=rank, world_size=count
        )
    (folder / str(rank)).write_bytes(pickle.dumps(work()))
    sys.stdout.flush()
    sys.stderr.flush()
    # at once: what libraries of earlier tests (Prefect) do at an exit needs threads that a fork has not
    os._exit(0)


def together(work: Callable[[], Any], count: int = 2, grouped: bool = True) -> list[Any]:
    """What `work` returned in each of `count` processes; they are forks, so the libraries are loaded."""
    with tempfile.TemporaryDirectory(prefix="popen-processes-") as folder:
        started = [
            get_context("fork").Process(target=_process, args=(work, rank, count, Path(folder), grouped))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        codes = [process.exitcode for process in started]
        assert codes == [0] * count, codes
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(count)]


@contextmanager
def at_work(
    begin: Callable[[], Any], end: Callable[[Any], object] = lambda begun: None
) -> Iterator[tuple[int, Event]]:
    """Another process, which has done `begin` and does `end` with what that returned once the event is set;
    its id and the event."""
    fork = get_context("fork")
    ready, leave = fork.Event(), fork.Event()

    def target() -> None:
        begun = begin()
        ready.set()
        leave.wait()
        end(begun)

    process = fork.Process(target=target)
    process.start()
    try:
        assert ready.wait(60)
        assert process.pid is not None
        yield process.pid, leave
    finally:
        process.kill()
        process.join()
