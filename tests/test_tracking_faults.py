"""What is deleted in MLflow or cannot be stored there ends no training, and no password is shown; with real
MLflow on a real SQLite file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from popen.errors import one_line, without_password
from popen.tracking import Tracker, end_parent, start_parent
from tests.test_tracking import client, environment, home, opened, stages

__all__ = ["environment", "home"]  # fixtures


def test_a_mistake_that_comes_to_light_at_the_end_keeps_no_run_open(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = opened(home, "late mistake")
    tracker.set_tags({"x" * 300: "too long a name"})
    tracker.log_metrics({"loss": 0.5})
    tracker.uri = f"sqlite:///{home / 'mlflow.db'}"
    tracker.close("FINISHED")
    assert "late mistake: warning: MLflow refused a record (" in capsys.readouterr().out
    (run,) = stages(home, "late mistake")
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})


def test_a_run_that_was_deleted_ends_no_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = opened(home, "deleted")
    (run,) = stages(home, "deleted")
    client(home).delete_run(run.info.run_id)
    for step in range(3):
        tracker.set_tags({"late": "yes"})
        tracker.log_metrics({"loss": 1.0}, step)
        tracker.do(lambda client, run: client.log_text(run, "", "late.txt"), "late.txt")
    tracker.close("FINISHED")
    printed = capsys.readouterr().out
    says = f"deleted: warning: the run {run.info.run_id} was deleted in MLflow; its records are dropped, "
    assert printed == f"{says}the stage goes on\n"
    assert client(home).get_run(run.info.run_id).data.tags.get("late") is None
    parent = run.data.tags["mlflow.parentRunId"]
    assert client(home).get_run(parent).info.status == "FINISHED"


def test_a_model_of_a_run_that_was_deleted_is_dropped_at_once(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlflow.start_run` words it as if the server were away."""
    import mlflow

    def record(_client: Any, run: str) -> None:
        mlflow.set_tracking_uri(tracker.uri)
        with mlflow.start_run(run_id=run):
            pass

    tracker, before = opened(home, "modelless"), mlflow.get_tracking_uri()
    client(home).delete_run(tracker.run_id)
    try:
        tracker.do(record, "the model")
    finally:
        mlflow.set_tracking_uri(before)
    assert "was deleted in MLflow" in capsys.readouterr().out
    tracker.close("FINISHED")
    assert capsys.readouterr().out == ""


def test_a_parent_that_was_deleted_is_made_anew(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = opened(home, "before")
    (run,) = stages(home, "before")
    parent = run.data.tags["mlflow.parentRunId"]
    client(home).delete_run(parent)
    first.close("FINISHED")
    later = [opened(home, "after") for _ in range(2)]
    for tracker in later:
        tracker.close("FINISHED")
    anew = {run.data.tags["mlflow.parentRunId"] for run in stages(home, "after")}
    assert parent not in anew
    assert [client(home).get_run(one).info.status for one in anew] == ["FINISHED"]
    assert stages(home, "before")[0].info.status == "FINISHED"

    flow = start_parent(home)
    client(home).delete_run(flow)
    end_parent(home, flow, "FINISHED")
    assert capsys.readouterr().out == ""


def test_an_experiment_that_was_deleted_ends_no_training(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(home, "setup").close("FINISHED")
    mlflow = client(home)
    experiment = mlflow.get_experiment_by_name("popen").experiment_id
    mlflow.delete_experiment(experiment)
    try:
        tracker = opened(home, "nowhere")
        tracker.log_metrics({"loss": 1.0})
    finally:
        mlflow.restore_experiment(experiment)
    assert "takes no records (The experiment" in capsys.readouterr().out
    tracker.close("FINISHED")
    assert stages(home, "nowhere")[0].data.metrics == {"loss": 1.0}


def blocked(tracker: Tracker, home: Path) -> Path:
    """A file where the folder of the run's artifacts belongs: nobody, not even root, can write there."""
    folder = home / "mlartifacts" / str(tracker.run_id)
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("")
    return folder


def test_files_that_cannot_be_stored_hold_nothing_else_up(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(_client: Any, _run: str) -> None:
        raise RuntimeError("the bucket is away")  # libraries of storages have errors of their own

    tracker = opened(home, "blocked")
    blocked(tracker, home)
    (tmp_path / "table.csv").write_text("a,b\n")
    tracker.log_artifact(tmp_path / "table.csv")
    tracker.do(away, "the model")
    tracker.set_tags({"late": "yes"})
    tracker.do(lambda client, run: client.set_tag(run, "other", "yes"), "a tag")
    tracker.log_metrics({"loss": 1.0})
    (run,) = stages(home, "blocked")
    assert run.data.tags["late"] == "yes"
    assert "blocked: warning: table.csv cannot be stored in MLflow yet (" in capsys.readouterr().out
    tracker.close("FAILED")
    printed = capsys.readouterr().out
    assert "blocked: warning: table.csv was not stored in MLflow (" in printed
    assert "blocked: warning: the model was not stored in MLflow (the bucket is away)" in printed
    assert "cannot be reached" not in printed
    (run,) = stages(home, "blocked")
    assert (run.info.status, run.data.metrics, run.data.tags["other"]) == ("FAILED", {"loss": 1.0}, "yes")


def test_files_are_stored_when_their_storage_is_back(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(home, "unblocked")
    file = blocked(tracker, home)
    (tmp_path / "table.csv").write_text("a,b\n")
    tracker.log_artifact(tmp_path / "table.csv")
    file.unlink()
    capsys.readouterr()
    tracker.close("FINISHED")
    assert capsys.readouterr().out == ""
    assert (file / "artifacts/table.csv").read_text() == "a,b\n"
    assert stages(home, "unblocked")[0].info.status == "FINISHED"


def test_no_password_is_printed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without_password("at postgresql+psycopg2://me:s/e@c@db:5432/x (a@b)") == (
        "at postgresql+psycopg2://me@db:5432/x (a@b)"
    )
    for text in ("http://127.0.0.1:5000", "sqlite:////home/a:b@c/mlflow.db", "http://me@host:1/x"):
        assert without_password(text) == text
    refused = OSError("API request to http://me:secret@host/api failed")  # as flows tell it
    assert one_line(refused) == "API request to http://me@host/api failed"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    opened(home, "secretive").close("FINISHED")  # MLflow's own message names the address, too
    printed = capsys.readouterr().out
    assert "MLflow at http://me@127.0.0.1:9 cannot be reached" in printed
    assert "secret@" not in printed
