"""Several processes of a module: what the one that started them says of their end, and its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def launch(folder: Path, ends: str) -> subprocess.Popen[str]:
    """Two processes: the first sleeps, the second does what `ends` says."""
    code = f"import os, sys, time\nif os.environ['RANK'] == '0':\n    time.sleep(60)\n{ends}\n"
    (folder / "ending.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, "-m", "popen.launch", "2", "ending", "an argument"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("sys.exit(f'{sys.argv[1]} is bad')", 1, "an argument is bad\n"),
        ("sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), 9)", 137, "ending: one of 2 processes was ended by SIGKILL; out of memory?\n"),
    ],
)
def test_the_one_that_fails_has_the_word(tmp_path: Path, ends: str, code: int, said: str) -> None:
    started = launch(tmp_path, ends)
    assert started.communicate(timeout=300) == ("", said)
    assert started.returncode == code


@pytest.mark.skipif(
    subprocess.run("unshare -u true", shell=True, capture_output=True).returncode != 0,
    reason="only root may give a process a machine's name of its own",
)
def test_a_machine_that_does_not_find_its_own_name_is_good_enough(tmp_path: Path) -> None:
    """torchrun asks for the address of the machine's name, and waits for ever where there is none."""
    (tmp_path / "meeting.py").write_text(
        "import os\nimport torch.distributed as dist\n"
        # in one write: what two processes print may interleave
        "dist.init_process_group('gloo')\ndist.barrier()\nos.write(1, b'met\\n')\n"
    )
    done = subprocess.run(
        ["unshare", "-u", "sh", "-c", f"hostname nowhere-at-all; {sys.executable} -m popen.launch 2 meeting"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "met\nmet\n"), done.stderr


def test_a_signal_ends_all_without_a_trace(tmp_path: Path) -> None:
    started = launch(tmp_path, f"open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(600)")
    deadline = time.monotonic() + 240
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.communicate(timeout=300) == ("", "")
    assert started.returncode == 128 + signal.SIGTERM
