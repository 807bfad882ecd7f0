"""Real MLflow on a real SQLite file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from popen import pipeline
from popen.mlflow_requests import flatten, legal
from popen.tracking import Tracker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clone, one database for the tests of this file: making the tables takes a second."""
    return tmp_path_factory.mktemp("clone")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def client(home: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def stages(home: Path, name: str) -> list[Any]:
    mlflow = client(home)
    experiment = mlflow.get_experiment_by_name("popen").experiment_id
    return list(mlflow.search_runs([experiment], f"tags.stage = '{name}'"))


def opened(home: Path, stage: str, **more: Any) -> Tracker:
    return Tracker(home, stage, more.pop("params", {}), more.pop("tags", {}), last_tries=(0.0,), **more)


def test_names_and_parameters_become_what_mlflow_takes() -> None:
    assert legal("refcoco+/cIoU") == "refcoco_plus/cIoU"
    assert legal("popen+ensemble/gIoU") == "popen_plus_ensemble/gIoU"
    assert legal("align@fine loss") == "align_fine loss"
    nested = {"sft": {"train": {"lr": 0.1, "on": True}}, "levels": [1, -2], "name": "custom", "none": None}
    flat = {
        "sft.train.lr": "0.1",
        "sft.train.on": "true",
        "levels": "[1, -2]",
        "name": "custom",
        "none": "null",
    }
    assert flatten(nested) == flat


def test_everything_arrives(home: Path, tmp_path: Path) -> None:
    params = {"group": {f"p{i}": i for i in range(150)}}
    tracker = opened(home, "everything", params=params, tags={"data": "abc"}, dataset="0" * 32 + ".dir")
    for step in range(1100):
        tracker.log_metrics({"loss": 1 / (step + 1), "rewards_t/margins": step, "refcoco+/cIoU": 0.5}, step)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "all.csv").write_text("a,b\n")
    tracker.log_artifact(tmp_path / "table")
    tracker.log_artifact(tmp_path / "table" / "all.csv", "loose")
    tracker.set_tags({"late": "yes"})
    tracker.close("FINISHED")

    mlflow = client(home)
    assert tracker.run_id is not None
    run = mlflow.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "everything"
    assert len(run.data.params) == 150
    assert run.data.params["group.p149"] == "149"
    assert run.data.tags["data"] == "abc"
    assert run.data.tags["late"] == "yes"
    history = mlflow.get_metric_history(tracker.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (s, 1 / (s + 1)) for s in range(1100)
    ]
    assert run.data.metrics["refcoco_plus/cIoU"] == 0.5
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("data", "0" * 32 + ".dir")
    base = Path(run.info.artifact_uri.removeprefix("file://"))
    assert base.is_relative_to(home / "mlartifacts")
    assert (base / "table" / "all.csv").read_text() == "a,b\n"
    assert (base / "loose" / "all.csv").read_text() == "a,b\n"


def test_metrics_are_sent_in_batches(home: Path) -> None:
    tracker = opened(home, "batches")
    tracker.log_metrics({"loss": 1.0}, 0)
    assert stages(home, "batches")[0].data.metrics == {}  # still in memory
    for step in range(1, 901):
        tracker.log_metrics({"loss": 1.0}, step)
    assert len(client(home).get_metric_history(tracker.run_id, "loss")) >= 900
    tracker.close("FINISHED")
    assert len(client(home).get_metric_history(tracker.run_id, "loss")) == 901


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_status_reaches_the_pipelines_run(home: Path, status: Any) -> None:
    tracker = opened(home, status)
    (run,) = stages(home, status)
    parent = run.data.tags["mlflow.parentRunId"]
    assert run.info.status == client(home).get_run(parent).info.status == "RUNNING"
    tracker.close(status)
    assert stages(home, status)[0].info.status == client(home).get_run(parent).info.status == status


def test_the_environment_names_the_parent_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(home, "first")
    first.close("FINISHED")
    monkeypatch.setenv("MLFLOW_RUN_ID", str(first.run_id))
    monkeypatch.setenv("POPEN_PARENT_RUN", str(first.run_id))
    second = opened(home, "second")
    second.close("FAILED")
    assert second.run_id != first.run_id
    assert stages(home, "second")[0].data.tags["mlflow.parentRunId"] == first.run_id
    assert client(home).get_run(first.run_id).info.status == "FINISHED"  # a parent that is not ours to end
    assert "MLFLOW_RUN_ID" not in os.environ


def test_a_server_that_is_away_loses_no_stage_and_no_record(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    away = opened(home, "away", params={"a": 1})
    away.log_metrics({"loss": 0.5}, 3)
    away.set_tags({"x": "y"})
    assert away.run_id is None
    away.close("FINISHED")
    printed = capsys.readouterr().out
    assert "away: warning: MLflow at http://127.0.0.1:9 cannot be reached" in printed
    assert "warning: 1 metrics and 3 other records and the run's end were not recorded in MLflow" in printed

    back = opened(home, "back", params={"a": 1})
    back.log_metrics({"loss": 0.5}, 3)
    back.uri = f"sqlite:///{home / 'mlflow.db'}"  # the server is there again
    back.close("FINISHED")
    (run,) = stages(home, "back")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1"}
    assert run.data.metrics == {"loss": 0.5}


def test_our_own_mistakes_are_not_taken_for_an_absent_server(home: Path, tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException

    tracker = opened(home, "mistake")
    with pytest.raises(MlflowException, match="exceeds the maximum length"):
        tracker.set_tags({"x" * 300: "too long a name"})
    with pytest.raises(FileNotFoundError, match="no such file to store with the run of stage mistake"):
        tracker.log_artifact(tmp_path / "gone")
    tracker.set_tags({"error": "a name was too long"})
    tracker.close("FAILED")
    (run,) = stages(home, "mistake")
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "a name was too long")


def test_files_lie_beside_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of `mlflow.db` and `mlartifacts` must be whole, whatever names the database."""
    places = {name: tmp_path / name for name in ("empty", "exported", "relative", "other")}
    for folder in places.values():
        folder.mkdir()
    client(places["empty"]).search_experiments()  # makes the tables, which takes a second
    for name in ("exported", "relative", "other"):
        shutil.copy(places["empty"] / "mlflow.db", places[name])
    (tmp_path / "elsewhere").mkdir()
    for name, clone, uri, cwd in (
        ("empty", "empty", "", "elsewhere"),
        ("exported", "exported", f"sqlite:///{places['exported'] / 'mlflow.db'}", "elsewhere"),
        ("relative", "relative", "sqlite:///mlflow.db", "relative"),
        ("other", "empty", f"sqlite:///{places['other'] / 'mlflow.db'}", "elsewhere"),
    ):
        monkeypatch.chdir(tmp_path / cwd)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        opened(tmp_path / clone, "files").close("FINISHED")
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        (run,) = stages(places[name], "files")
        assert run.info.artifact_uri.startswith(f"{(places[name] / 'mlartifacts').as_uri()}/"), name


def test_runs_of_killed_processes_are_ended(home: Path) -> None:
    host, pid, start = pipeline.process_name().split(":")
    opened(home, "setup").close("FINISHED")
    mlflow = client(home)
    experiment = mlflow.get_experiment_by_name("popen").experiment_id
    dead = mlflow.create_run(experiment, tags={"process": f"{host}:{pid}:{int(start) - 1}"}).info.run_id
    alive = mlflow.create_run(experiment, tags={"process": f"{host}:{pid}:{start}"}).info.run_id
    other = mlflow.create_run(experiment, tags={"process": "elsewhere:1:1"}).info.run_id
    opened(home, "next").close("FINISHED")
    assert [mlflow.get_run(run).info.status for run in (dead, alive, other)] == [
        "KILLED",
        "RUNNING",
        "RUNNING",
    ]


CHILD = """
import sys
from pathlib import Path
from popen.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), sys.argv[2], {"a": 1}, {})
for step in range(1000):
    tracker.log_metrics({"loss": step}, step)
tracker.close("FINISHED")
"""
# Stands for `dvc repro`: stages look for an ancestor of that name.
DVC = """
import subprocess, sys
command = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
stages = [subprocess.Popen([*command, name]) for name in sys.argv[3:]]
sys.exit(any([stage.wait() for stage in stages]))
"""


def test_processes_that_start_at_once_share_one_parent_and_one_sound_database(tmp_path: Path) -> None:
    dvc = tmp_path / "dvc"
    dvc.write_text(DVC)
    command = [sys.executable, str(dvc), str(tmp_path), CHILD]
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipelines = [subprocess.Popen([*command, *names], **pipe) for names in (["a", "b"], ["c"])]
    # The limit only ends a hang: on a busy machine the imports alone may take half a minute.
    printed = [process.communicate(timeout=300)[0] for process in pipelines]
    assert [process.returncode for process in pipelines] == [0, 0], printed
    assert not any("warning" in text for text in printed), printed

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT COUNT(*) FROM metrics").fetchone() == (3000,)
        assert database.execute("SELECT COUNT(*) FROM experiments WHERE name = 'popen'").fetchone() == (1,)
    parents = {name: stages(tmp_path, name)[0].data.tags["mlflow.parentRunId"] for name in "abc"}
    assert parents["a"] == parents["b"] != parents["c"]
    ended = stages(tmp_path, "pipeline")
    assert {run.info.run_id for run in ended} == set(parents.values())
    assert [run.info.status for run in ended] == ["FINISHED", "FINISHED"]
