"""One stage as a process: its outcome, its lines, its failure, and that nothing of it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows import stage_process
from flows.stage_process import Outcome, StageError, StageStopped, StageTimeout, reproduce
from tests.flows.conftest import Make, import_data, stage, status


def run(root: Path, name: str, **more: float | bool) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    outcome = reproduce(root, name, lines.append, stop=threading.Event(), **more)  # type: ignore[arg-type]
    return outcome, lines


def sleepers(seconds: str) -> list[psutil.Process]:
    """The processes `sleep SECONDS`; each test has a number of its own."""
    return [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if p.info["cmdline"] == ["sleep", seconds] and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_it_runs_then_is_cached_then_is_restored(make: Make) -> None:
    root = make({"a": stage("echo one; echo two >&2; echo ${x} > a.txt", "a.txt", params=["x"])}, x=1)
    outcome, lines = run(root, "a")
    assert outcome is Outcome.RAN
    assert lines[:4] == ["Running stage 'a':", "> echo one; echo two >&2; echo 1 > a.txt", "one", "two"]
    assert run(root, "a")[0] is Outcome.CACHED
    assert run(root, "a", force=True)[0] is Outcome.RAN
    (root / "a.txt").unlink()
    (root / "dvc.lock").unlink()
    assert run(root, "a")[0] is Outcome.RESTORED
    assert status(root) == {}


def test_the_import_of_the_data_is_cached_too(make: Make, tmp_path: Path) -> None:
    root = make({})
    (tmp_path / "source").write_text("1")
    import_data(root, tmp_path / "source")
    assert run(root, "data.dvc")[0] is Outcome.CACHED
    (tmp_path / "source").write_text("2")
    assert run(root, "data.dvc")[0] is Outcome.RAN


def test_a_stage_that_prints_dvcs_words_is_not_cached(make: Make) -> None:
    root = make({"a": stage("echo \"Stage 'b' didn't change, skipping\"; echo 1 > a.txt", "a.txt")})
    assert run(root, "a")[0] is Outcome.RAN


def test_lines_come_while_it_runs_and_progress_bars_become_few(make: Make) -> None:
    bar = "python -c \"import sys; [sys.stderr.write(f'\\\\r{i}%') for i in range(101)]; print(flush=True)\""
    root = make({"a": stage(f"{bar}; printf 'no newline'; sleep 1; echo 1 > a.txt", "a.txt")})
    times: dict[str, float] = {}
    reproduce(root, "a", lambda line: times.setdefault(line, time.monotonic()), stop=threading.Event())
    percent = [line for line in times if line.endswith("%")]
    assert percent == ["0%", "100%"]
    assert time.monotonic() - times["100%"] > 1.0  # before the sleep, not at the end
    assert any(line.startswith("no newline") for line in times)


def test_a_failed_stage_raises_with_its_last_lines(make: Make) -> None:
    root = make({"a": stage("seq 1 40; echo 'error: connection refused' >&2; exit 3", "a.txt")})
    with pytest.raises(StageError) as caught:
        run(root, "a")
    lines = str(caught.value).splitlines()
    assert lines[0] == "a failed with code 255; its last lines:"
    assert {"40", "error: connection refused"} <= set(lines)
    assert "exited with 3" in lines[-1]
    assert "20" not in lines
    assert len(lines) == 21
    assert not caught.value.retry  # the stage itself failed, whatever it says


@pytest.mark.parametrize(
    ("lines", "retry"),
    [
        (["ERROR: failed to reproduce 'data.dvc': dependency 'https://host/data' does not exist"], True),
        (['ERROR: unexpected error - Could not connect to the endpoint URL: "https://b"'], True),
        (["ERROR: unexpected error - [Errno 111] Connect call failed ('127.0.0.1', 22)"], True),
        (["ERROR: failed to push data to the cloud - 3 files failed to upload"], True),
        (["HTTP 503: try later"], True),
        (["ERROR: failed to reproduce 'a': missing data 'source': b.txt"], False),
        (["ERROR: output 'a.txt' does not exist"], False),
        (
            ["503 steps", "timed out", "ERROR: failed to reproduce 'a': failed to run: x, exited with 1"],
            False,
        ),
    ],
)
def test_only_remote_storage_is_tried_again(lines: list[str], retry: bool) -> None:
    assert StageError("a", 255, lines).retry is retry
    assert not StageError("a", -9, lines).retry


def test_a_stage_that_takes_too_long_is_killed_with_its_children(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "GRACE", 1.0)
    root = make({"a": stage("trap '' TERM; sleep 7771 & sleep 7772; wait; echo 1 > a.txt", "a.txt")})
    with pytest.raises(StageTimeout, match=r"a: stopped after 3 s \(stage_timeout\)"):
        run(root, "a", timeout=3.0)
    assert not sleepers("7771")
    assert not sleepers("7772")


def test_a_stop_ends_it_gently(make: Make) -> None:
    root = make(
        {
            "a": stage(
                "trap 'echo ended > end.here; exit 1' TERM; touch begun.here; sleep 7773 & wait", "a.txt"
            )
        }
    )
    stop, caught = threading.Event(), []

    def work() -> None:
        try:
            reproduce(root, "a", print, stop=stop)
        except StageStopped as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while not sleepers("7773") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sleepers("7773")
    stop.set()
    thread.join(30)
    assert [str(error) for error in caught] == ["a: stopped, because the flow ends"]
    assert (root / "end.here").read_text() == "ended\n"
    assert not sleepers("7773")


def test_an_error_of_the_listener_ends_it_too(make: Make) -> None:
    root = make({"a": stage("echo now; sleep 7774; echo 1 > a.txt", "a.txt")})

    def refuse(line: str) -> None:
        if line == "now":
            raise OSError("the log is away")

    with pytest.raises(OSError, match="the log is away"):
        reproduce(root, "a", refuse, stop=threading.Event())
    assert not sleepers("7774")
    assert run(make_cheap(root), "a")[0] is Outcome.RAN  # and no lock is left behind


def test_what_ends_while_it_is_looked_at_is_no_zombie_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "7775"], start_new_session=True)
    look = psutil.process_iter

    def ends(attributes: list[str]) -> Iterator[psutil.Process]:
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not collected
        return look(attributes)

    monkeypatch.setattr(psutil, "process_iter", ends)
    stage_process._end_group(process)
    assert not psutil.pid_exists(process.pid)


def test_what_a_stage_started_in_a_group_of_its_own_ends_with_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts the processes of a stage on several devices; these do not listen."""
    monkeypatch.setattr(stage_process, "GRACE", 1.0)
    root = make(
        {"a": stage("setsid sh -c \"trap '' TERM; sleep 7776; sleep 7777\" & wait; echo 1 > a.txt", "a.txt")}
    )
    with pytest.raises(StageTimeout):
        run(root, "a", timeout=3.0)
    assert not sleepers("7776")
    assert not sleepers("7777")


def make_cheap(root: Path) -> Path:
    (root / "dvc.yaml").write_text((root / "dvc.yaml").read_text().replace("sleep 7774; ", ""))
    return root
