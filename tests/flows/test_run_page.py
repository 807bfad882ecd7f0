"""The links to MLflow's pages, against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.run_page import links
from popen.tracking import end_parent, start_parent
from tests.flows.test_mlflow_away import Server, mlflow
from tests.waiting import until

__all__ = ["mlflow"]  # a fixture


def test_a_link_names_no_password(mlflow: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{mlflow.port}")
    mlflow.begin()
    until(mlflow.answers)
    parent = start_parent(tmp_path)
    end_parent(tmp_path, parent, "FINISHED")
    page = links(tmp_path, parent)
    assert f"(http://me@127.0.0.1:{mlflow.port}/#/experiments/1/runs/{parent}): finished" in page
    assert "secret" not in page
