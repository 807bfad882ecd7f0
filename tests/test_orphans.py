"""A process that ends with its parent."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

CHILD = """
import os, signal, time
from popen.orphans import end_with
print(os.getpid(), end_with({parent}, signal.SIGTERM), flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}.replace("{{parent}}", str(os.getpid()))])
time.sleep(600)
"""


def test_it_ends_when_its_parent_is_killed() -> None:
    code = PARENT.format(child=CHILD)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number, asked = parent.stdout.readline().split()
        assert asked == "True"
        child = psutil.Process(int(number))
        parent.kill()
        deadline = time.monotonic() + 30
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_it_knows_that_its_parent_has_ended_already() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    code = CHILD.format(parent=gone.pid).replace("time.sleep(600)", "")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split()[1] == "False"
