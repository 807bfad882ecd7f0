"""A stage at work, for the tests of what stages share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from popen.stages.run import QUIET, Run, stage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A stage at work in a folder of its own."""
    (tmp_path / ".dvc").mkdir()
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (*QUIET, "HF_HUB_OFFLINE", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "input").write_text("data")
    with stage("align@coarse") as run:
        yield run
