"""What a stage does around its work, in real processes where signals matter."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from popen.params import ModelParams, ParamsError, load
from popen.stages.run import QUIET, needs_hub, stage
from popen.tracking import Status, Tracker

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC root with parameters; one for this file, for making MLflow's tables takes a second."""
    root = tmp_path_factory.mktemp("clone")
    (root / ".dvc").mkdir()
    (root / "deep" / "er").mkdir(parents=True)
    shutil.copy(PARAMS, root)
    return root


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, clone: Path) -> None:
    """Stages set variables for their whole process, which here is pytest: take them back afterwards."""
    for name in (*QUIET, "HF_HUB_OFFLINE", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "POPEN_PARENT_RUN", "POPEN_DEBUG", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(clone)


def recorded(clone: Path, name: str) -> Any:
    from mlflow.tracking import MlflowClient

    mlflow = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    experiment = mlflow.get_experiment_by_name("popen")
    assert experiment is not None
    (run,) = mlflow.search_runs([experiment.experiment_id], f"tags.stage = '{name}'")
    return run


@pytest.mark.parametrize(
    ("name", "given", "usage"),
    [
        ("align", ["foo"], "coarse|fine"),
        ("align", [], "coarse|fine"),
        ("evaluate", ["muse_val"], "BENCHMARK SYSTEM"),
    ],
)
def test_a_stage_by_hand_with_other_arguments_says_how(name: str, given: list[str], usage: str) -> None:
    command = [sys.executable, "-m", f"popen.stages.{name}", *given]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (1, f"usage: python -m popen.stages.{name} {usage}\n")


def test_a_stage_runs_in_the_root_with_parameters_and_leaves_its_curves(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone / "deep" / "er")
    (clone / "data.dvc").write_text("outs:\n- {path: data, md5: abc.dir}\n")
    with stage("evaluate@refcoco+-popen") as run:
        assert Path.cwd() == run.root == run.home == clone
        assert run.params == load(clone / "params.yaml")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert os.environ["GX_ANALYTICS_ENABLED"] == "false"
        for step in (20, 10):
            run.log_metrics({"b": step / 4, "a": step}, step)
        run.log_metrics({"a": 11.0}, 10)  # a resumed stage records a step again
        run.log_metrics({"final": 7.0})
        run.curves(Path("artifacts/curves/x.csv"))
    assert Path.cwd() == clone / "deep" / "er"
    rows = list(csv.reader((clone / "artifacts/curves/x.csv").open()))
    assert rows == [
        ["step", "name", "value"],
        ["10", "a", "11.0"],
        ["10", "b", "2.5"],
        ["20", "a", "20.0"],
        ["20", "b", "5.0"],
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluate@refcoco+-popen: started"
    assert lines[-1].startswith("evaluate@refcoco+-popen: finished after ")

    kept = recorded(clone, "evaluate@refcoco+-popen")
    assert kept.info.status == "FINISHED"
    assert kept.data.metrics == {"a": 20.0, "b": 5.0, "final": 7.0}
    assert kept.data.params["sft.train.lr"] == str(load(clone / "params.yaml").sft.train.lr)
    assert kept.data.tags["data"] == "abc.dir"
    assert kept.inputs.dataset_inputs[0].dataset.digest == "abc.dir"


def test_a_workspace_of_dvc_exp_keeps_records_and_checkpoints_in_the_clone(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".dvc").mkdir()
    shutil.copy(PARAMS, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(clone))
    with stage("workspace") as run:
        assert (Path.cwd(), run.root, run.home) == (tmp_path, tmp_path, clone)
    assert recorded(clone, "workspace").info.status == "FINISHED"
    assert not (tmp_path / "mlflow.db").exists()


def test_own_errors_are_one_line(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, stage("refused"):
        raise ParamsError("sft.lr: must be positive")
    assert caught.value.code == 1
    # another test's import of MLflow may have left its logger loud in this process: its lines are not ours
    ours = [line for line in capsys.readouterr().err.splitlines() if not line[:2].isdigit()]
    assert ours == ["refused: error: sft.lr: must be positive"]
    kept = recorded(clone, "refused")
    assert (kept.info.status, kept.data.tags["error"]) == ("FAILED", "sft.lr: must be positive")

    monkeypatch.setenv("POPEN_DEBUG", "1")
    with pytest.raises(ParamsError), stage("debugged"):
        raise ParamsError("sft.lr: must be positive")


def test_a_full_disk_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"), stage("full"), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert "full: error: disk full while writing an output: free space" in capsys.readouterr().err


def test_a_bug_keeps_its_trace_and_its_last_line_is_recorded(clone: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage("bug"):
        print(1 / 0)
    kept = recorded(clone, "bug")
    assert (kept.info.status, kept.data.tags["error"]) == ("FAILED", "ZeroDivisionError: division by zero")


def test_sigterm_is_recorded_and_the_handler_given_back(clone: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, stage("terminated"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert recorded(clone, "terminated").info.status == "KILLED"


def test_a_second_sigterm_does_not_break_off_the_records(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends a group of processes signals a stage twice: itself, and by the end of the `dvc` above."""
    close = Tracker.close

    def signalled(tracker: Tracker, status: Status) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(tracker, status)

    monkeypatch.setattr(Tracker, "close", signalled)
    with pytest.raises(SystemExit) as caught, stage("terminated twice"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert recorded(clone, "terminated twice").info.status == "KILLED"


def test_bad_parameters_stop_a_stage_in_one_line_before_anything_else(clone: Path, tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    raw = yaml.safe_load(PARAMS.read_text())
    raw["sft"]["trian"] = raw["sft"].pop("train")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    program = "from popen.stages.run import stage\nwith stage('sft') as run: print('reached')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("sft: error: ")
    assert "sft.trian: there is no such parameter" in done.stderr
    assert not (tmp_path / "mlflow.db").exists()


STAGE = """
import signal
from popen.stages.run import stage
with stage("orphan"):
    print("ready", flush=True)
    signal.pause()
"""


def test_a_stage_does_not_outlive_its_dvc(clone: Path) -> None:
    dvc = clone / "dvc"  # stages look for an ancestor of this name
    dvc.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n")
    with subprocess.Popen(
        [sys.executable, str(dvc), STAGE], cwd=clone, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in "ab"] == ["orphan: started\n", "ready\n"]
        process.kill()
        rest = process.stdout.read()  # ends when the stage, which holds the other end, has ended
    assert rest.startswith("orphan: killed after ")
    assert recorded(clone, "orphan").info.status == "KILLED"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'pandas', 'numpy', 'matplotlib', 'great_expectations'}"
    program = f"import sys, popen.stages.run; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == ""


def _model(**changes: dict[str, str]) -> Any:
    raw = yaml.safe_load(PARAMS.read_text())
    for part, values in changes.items():
        raw["model"][part] |= values
    return load(PARAMS).model_copy(update={"model": ModelParams.model_validate(raw["model"])})


def test_the_hub_is_asked_only_for_models_that_are_not_on_this_disk(tmp_path: Path) -> None:
    assert not needs_hub(_model())
    assert needs_hub(_model(language={"name": "llava-hf/llava-1.5-7b-hf"}))
    assert not needs_hub(_model(language={"name": str(tmp_path)}))
    assert needs_hub(_model(vision={"name": "ViT-L-14-336", "pretrained": "openai"}))
    assert not needs_hub(_model(vision={"name": "ViT-L-14-336", "pretrained": str(tmp_path)}))
    assert not needs_hub(_model(vision={"name": "ViT-L-14-336", "pretrained": ""}))
