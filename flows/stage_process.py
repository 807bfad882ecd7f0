"""One `dvc` command as a process group: its lines as they come, its end, and no survivors.

A thread of the flow waits for the process, so the process is asked to die with that thread: when the flow
is killed outright, nobody else is left to stop the stage.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import psutil

from popen.orphans import end_with

GRACE = 20.0  # seconds from SIGTERM to SIGKILL: a stage ends its MLflow run in that time
FREE_SPACE = "the disk is full, free space and start the run again"
_TAIL = 20  # lines that an error holds
_PROGRESS_EVERY = 10.0  # seconds between two states of one progress bar
_POLL = 0.2  # seconds in which a stop is noticed

# How DVC words that the command of the stage failed. Everything about it is the stage's own affair.
_COMMAND_FAILED = "failed to run: "
# How DVC and the libraries below it (requests, aiohttp, botocore, asyncssh) word a remote that is away.
_REMOTE_FAILED = re.compile(
    r"dependency '\w+://[^']*' does not exist|"
    r"failed to (pull|push|fetch|download|upload|transfer)|unable to connect|could not connect|"
    r"cannot connect|connect call failed|connection (refused|reset|lost|closed|aborted|error)|timed? ?out|"
    r"name resolution|network is unreachable|no route to host|endpoint url|server disconnected|"
    r"(?<!\d)(429|500|502|503|504)(?!\d)[ ,:]|service unavailable|slow ?down",
    re.IGNORECASE,
)


_DISK_FULL = re.compile("No space left on device|Disk quota exceeded|disk is full|disk full while writing")


class Outcome(StrEnum):
    """What `dvc repro` did with a stage."""

    RAN = "ran"
    RESTORED = "restored"  # from the run cache: these inputs had been computed before
    CACHED = "cached"  # nothing changed


class StageError(RuntimeError):
    """A `dvc` command failed. `retry` says whether the fault lay with remote storage, which may come back;
    `full`, whether the disk was full."""

    def __init__(self, what: str, code: int, lines: list[str]) -> None:
        reason = f"was killed by signal {-code}" if code < 0 else f"failed with code {code}"
        text = "\n".join(lines)
        self.full = bool(_DISK_FULL.search(text))
        remedy = f": {FREE_SPACE}" if self.full else ""
        super().__init__(f"{what} {reason}{remedy}; its last lines:\n{text}")
        remote = _COMMAND_FAILED not in text and bool(_REMOTE_FAILED.search(text))
        self.retry = code > 0 and remote and not self.full


class StageTimeout(RuntimeError):
    """A stage took longer than it may."""


class StageStopped(RuntimeError):
    """The flow was cancelled or failed, and the stage was stopped with it."""


def reproduce(
    root: Path,
    stage: str,
    say: Callable[[str], object],
    *,
    stop: threading.Event,
    force: bool = False,
    pull: bool = False,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """`dvc repro` of one stage in `root`, whatever the state of the stages it needs.

    `pull` fetches outputs that the run cache knows and this clone lacks. `say` gets every line, `stop` ends
    the stage when it is set, `timeout` is in seconds. Raises what `run_dvc` raises.
    """
    options = [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    words = ["--wait-for-lock", "repro", "--single-item", *options, stage]
    lines = run_dvc(root, words, stage, say, stop=stop, timeout=timeout, environment=environment)
    # the stage's name is compared, so that nothing else which the lines hold is taken for it
    if {f"Stage '{stage}' didn't change, skipping", f"'{stage}' didn't change, skipping"} & set(lines):
        return Outcome.CACHED
    if any(line.startswith(f"Stage '{stage}' is cached - skipping run") for line in lines):
        return Outcome.RESTORED
    return Outcome.RAN


def run_dvc(
    root: Path,
    words: list[str],
    what: str,
    say: Callable[[str], object],
    *,
    stop: threading.Event,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """`dvc WORDS` in `root`; returns the last lines (stdout and stderr as they came).

    The process group is empty afterwards, whatever happens. Raises StageError when the command fails,
    StageTimeout after `timeout` seconds, StageStopped when `stop` is set.
    """
    if stop.is_set():
        raise StageStopped(f"{what}: not started, because the flow ends")
    began = time.monotonic()
    tail: deque[str] = deque(maxlen=_TAIL)
    lines = _Lines(tail, say)
    # `python` in the stages' commands is the interpreter that runs the flow
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"} | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with(os.getpid()),
    )
    assert process.stdout is not None
    try:
        while _read(process, lines):
            if stop.is_set():
                raise StageStopped(f"{what}: stopped, because the flow ends")
            if timeout is not None and time.monotonic() - began > timeout:
                raise StageTimeout(
                    f"{what}: stopped after {timeout:g} s (stage_timeout); allow more, or make it smaller: "
                    "the next run goes on from its last checkpoint"
                )
    finally:
        _end_group(process)
        process.stdout.close()
    lines.end()
    if process.returncode:
        raise StageError(what, process.returncode, list(tail))
    return list(tail)


def _read(process: subprocess.Popen[bytes], lines: _Lines) -> bool:
    """Pass on what the process printed; False once it has ended (or has closed its output)."""
    assert process.stdout is not None
    ended = process.poll() is not None
    ready, _, _ = select.select([process.stdout], [], [], 0 if ended else _POLL)
    chunk = os.read(process.stdout.fileno(), 65536) if ready else b""
    lines.add(chunk)
    if ready and not chunk:
        process.wait()
        return False
    return bool(chunk) or not ended  # after its end only what is in the pipe: a survivor may hold it open


class _Lines:
    """Bytes to lines. A progress bar overwrites itself with carriage returns: of its states only one in ten
    seconds and the last are lines."""

    def __init__(self, tail: deque[str], say: Callable[[str], object]) -> None:
        self._tail, self._say = tail, say
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._progress_at = -_PROGRESS_EVERY

    def add(self, chunk: bytes) -> None:
        *parts, self._rest = re.split(r"(\r\n|\n|\r(?!\Z))", self._rest + self._decoder.decode(chunk))
        for text, end in zip(parts[::2], parts[1::2], strict=True):
            if end != "\r":
                self._emit(text)
            elif time.monotonic() - self._progress_at >= _PROGRESS_EVERY and text.strip():
                self._progress_at = time.monotonic()
                self._emit(text)

    def end(self) -> None:
        self._emit(self._rest.rstrip("\r"))

    def _emit(self, text: str) -> None:
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).rstrip()
        if text:
            self._tail.append(text)
            self._say(text)


def _die_with(parent: int) -> Callable[[], None]:
    def ask() -> None:
        if not end_with(parent, signal.SIGTERM):
            os._exit(143)

    return ask


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what is left of the group, SIGKILL after the grace period, until nothing is left. What it
    started in groups of their own (a stage on several devices) ends with it, or is killed, too."""
    below = _below(process)
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if not _alive(process) and not any(map(_runs, below)):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for other in below if number == signal.SIGKILL else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
        deadline = time.monotonic() + patience
        while (_alive(process) or any(map(_runs, below))) and time.monotonic() < deadline:
            time.sleep(0.05)


def _below(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the group still runs (a zombie that its parent has not asked for does not)."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    for other in psutil.process_iter(["status"]):
        try:
            if os.getpgid(other.pid) == process.pid and other.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    process.poll()  # last: DVC takes a lock for held as long as its holder is so much as a zombie
    return False
