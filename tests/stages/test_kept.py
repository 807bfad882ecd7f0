"""Where a stage keeps what it has done: what it goes on from, and what it does not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from popen.parts import in_batches
from popen.stages import kept
from popen.stages.kept import kept_parts, kept_steps
from popen.stages.learning import fit
from popen.stages.run import Run
from tests import test_parts
from tests import test_training as toys
from tests.conftest import WEIGHTS
from tests.processes import at_work, together
from tests.stages.test_learning import PARAMS, checkpoints, saves, start
from tests.test_parts import EXPECTED, NUMBERS, tens
from tests.waiting import free_port

PLAIN = test_parts.kept(Path())  # how its records are written and read


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's code, for a stage whose code changes."""
    source = Path(kept.__file__).parents[1]
    copied = shutil.copytree(source, tmp_path / "code/popen")
    shutil.copy(source.parent / "dvc.yaml", tmp_path / "code")
    monkeypatch.setattr(kept, "__file__", str(copied / "stages/kept.py"))
    return copied


@pytest.mark.parametrize("changed", ["input", "parameter", "settings", "seed", "code"])
def test_another_configuration_starts_anew(run: Run, package: Path, changed: str) -> None:
    with pytest.raises(toys.Interrupted):
        start(run, toys.toy(), lambda: None, toys.interrupted(8 * PARAMS.images))
    assert checkpoints() == ["step-00000005"]
    asked: list[int] = []

    def watch(index: int) -> Any:
        asked.append(index)
        return toys.item(index)

    params, settings = PARAMS, WEIGHTS
    if changed == "input":
        Path("input").write_text("other data")
    elif changed == "parameter":
        params = PARAMS.model_copy(update={"lr": 0.01})
    elif changed == "settings":
        settings = WEIGHTS.model_copy(update={"ce": 2.0})
    elif changed == "code":
        losses = package / "model/losses.py"
        losses.write_text(losses.read_text() + "\n# what made it diverge is mended\n")
    else:
        run.params = run.params.model_copy(update={"seed": 5})
    model = toys.toy()
    fit(run, model, params, watch, toys.collate, toys.loss, None, [Path("input")], [settings], saves(model))
    assert min(asked) == 0


def test_batches_of_other_code_are_not_mixed_with(run: Run, package: Path) -> None:
    def told(make: Callable[[int], Iterator[int]]) -> list[int]:
        parts = kept_parts(run, [Path("input")], [], PLAIN.write, PLAIN.read)
        return list(in_batches(NUMBERS, make, "test", parts))

    def killed(number: int) -> Iterator[int]:
        if number == NUMBERS[3]:
            raise toys.Interrupted
        return iter([-number])  # what the old code makes of it

    with pytest.raises(toys.Interrupted):
        told(killed)
    (package / "model/__pycache__").mkdir(exist_ok=True)
    (package / "model/__pycache__/look.cpython-311.pyc").write_bytes(b"compiled anew")  # which is no edit
    (package / "cli.py").write_text("# not the stage's code\n")
    old = [-number for number in NUMBERS[:3]]
    assert told(tens)[:3] == old
    (package / "masks.py").write_text("# other code\n")
    assert told(tens) == EXPECTED


def test_two_processes_share_batches_behind_a_stage_that_removes_its_own(run: Run) -> None:
    """The helper once worked beside the other stage, which then removed its batches: the main process waited
    for them for good."""

    def start() -> Any:
        parts = kept_parts(run, [Path("input")], [], PLAIN.write, PLAIN.read)
        parts.save(NUMBERS[0], list(tens(NUMBERS[0])))
        return parts

    with at_work(start, lambda parts: parts.clear()) as (_, leave):
        Timer(1.0, leave.set).start()

        def work() -> tuple[bool, list[int]]:
            signal.alarm(120)  # rather than hang
            parts = kept_parts(run, [Path("input")], [], PLAIN.write, PLAIN.read)
            return leave.is_set(), list(in_batches(NUMBERS, tens, "test", parts))

        assert together(work, grouped=False) == [(True, EXPECTED), (True, [])]


def test_two_processes_wait_for_another_training_longer_than_for_each_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.distributed.distributed_c10d, "default_pg_timeout", timedelta(seconds=2)
    )  # of half an hour
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    key = (run, [Path("input")], [PARAMS, WEIGHTS])
    with at_work(lambda: kept_steps(*key), lambda steps: steps.clear()) as (_, leave):
        Timer(5.0, leave.set).start()

        def work() -> bool:
            signal.alarm(120)
            run.main = os.environ["RANK"] == "0"
            model = toys.toy(0.0)
            start(run, model, saves(model))
            return leave.is_set()

        assert together(work, grouped=False) == [True, True]
    assert Path("result").exists()
    assert checkpoints() == []
