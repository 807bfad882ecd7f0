from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.pipeline import main
from tests.flows.conftest import Make, stage


def test_a_run_without_a_server_ends_quietly(make: Make, tmp_path: Path) -> None:
    root = make({"a": stage("touch a.txt", "a.txt")})
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-m", "flows.pipeline"]
    run = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=True)
    said = run.stdout + run.stderr
    assert (root / "a.txt").exists()
    assert "Starting temporary server" in said
    assert "prefect.server" not in said  # the logger that tells of its own end in stack traces


def test_a_failed_run_ends_with_one_line(make: Make, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make({"a": stage("false", "a.txt")}))
    monkeypatch.setattr(sys, "argv", ["flows.pipeline"])
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")  # so that it is taken back
    with pytest.raises(SystemExit, match=r"^error: failed: a\. The log of each task has its last lines$"):
        main()
