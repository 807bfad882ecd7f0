"""A stage on two devices, started as DVC starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from mlflow.tracking import MlflowClient

from popen.model.segmenter import Segmenter
from popen.samples import Sample, write_index

ROOT = Path(__file__).parents[2]


def run(clone: Path, devices: str, *start: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "POPEN_"))}
    return subprocess.run(
        [sys.executable, "-m", *start],
        cwd=clone,
        env=kept | {"POPEN_DEVICES": devices, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_two_devices_write_the_file_of_one(
    taught: Segmenter, data: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    (tmp_path / ".dvc").mkdir()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["data"]["root"] = str(data[0])
    params["evaluate"] |= {"batch": 1, "max_new_tokens": 24}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    taught.save(tmp_path / "artifacts/models/sft")
    write_index(tmp_path / "artifacts/index/preference.jsonl", data[1])
    out = tmp_path / "artifacts/preferences/text.jsonl"
    written = []
    for devices in "21":
        done = run(tmp_path, devices, "popen.stages.text_preferences")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("text_preferences: started") == 1
        assert done.stdout.count("text_preferences: finished") == 1
        written.append(out.read_bytes())
        assert list((tmp_path / ".checkpoints").iterdir()) == []
        shutil.rmtree(out.parent)
    assert written[0] == written[1]
    assert written[0].count(b"\n") == len(data[1])
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("popen")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'text_preferences'")
    assert [(one.info.status, one.data.metrics["pairs"]) for one in runs] == [("FINISHED", 4.0)] * 2


def test_what_cannot_run_on_several_devices_says_so(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    done = run(tmp_path, "two", "popen.stages.text_preferences")
    assert done.returncode == 1
    assert (
        done.stderr == "text_preferences: error: POPEN_DEVICES is 'two'; give the number of devices, as "
        "POPEN_DEVICES=8\n"
    )
