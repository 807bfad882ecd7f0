"""Stages on two devices leave what they leave on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from popen.evaluation.prediction import read_predictions
from popen.model.segmenter import Segmenter
from popen.params import Params, load
from popen.preference.records import read_text_pairs, write_records
from popen.samples import Sample, write_index
from popen.stages import align, evaluate, mask_preferences, sft
from tests.preference.test_sampling import MASKS, TEXT, texts
from tests.processes import together

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Data = tuple[Path, list[Sample]]


def clone(folder: Path, model: Segmenter, data: Data) -> Path:
    """A DVC root with what the stages before have left."""
    (folder / ".dvc").mkdir(parents=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["data"]["root"] = str(data[0])
    params["evaluate"] |= {
        "batch": 3,
        "max_new_tokens": 24,
        "bf16": False,
    }  # in float32 the two agree closely
    params["text_preferences"], params["mask_preferences"] = TEXT.model_dump(), MASKS.model_dump(mode="json")
    params["align"]["train"] |= {"steps": 3, "images": 4, "muon": 0.0, "bf16": False}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    model.save(folder / "artifacts/models/sft")
    model.save(folder / "artifacts/models/popen")
    for role in ("preference", "muse_val"):
        write_index(folder / f"artifacts/index/{role}.jsonl", data[1])
    (folder / "artifacts/thresholds.json").write_text('{"popen": 0.5}')
    return folder


def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("popen")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.stage != 'pipeline'")
    return sorted(found, key=lambda run: str(run.data.tags["stage"]))


def test_two_devices_are_asked_for_by_a_variable(taught: Segmenter, data: Data, tmp_path: Path) -> None:
    folder = clone(tmp_path, taught, data)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "POPEN_"))}
    done = subprocess.run(
        [sys.executable, "-m", "popen.stages.text_preferences"],
        cwd=folder,
        env=kept | {"POPEN_DEVICES": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("text_preferences: started") == done.stdout.count(": finished") == 1
    assert list(read_text_pairs(folder / "artifacts/preferences/text.jsonl")) == texts(taught, data)
    assert list((folder / ".checkpoints").iterdir()) == []
    (run,) = runs(folder)
    assert (run.info.status, run.data.metrics["pairs"]) == ("FINISHED", 4.0)


def test_sft_of_a_small_model_is_two_processes_on_a_cpu(
    mini_model: Segmenter, data: Data, tmp_path: Path
) -> None:
    folder = clone(tmp_path, mini_model, data)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"] = mini_model.params.model_dump(mode="json")
    params["sft"]["train"] |= {"steps": 2, "images": 4}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for role in ("train", "val"):
        write_index(folder / f"artifacts/index/{role}.jsonl", data[1])
    (folder / "artifacts/vision").mkdir()
    save_file({"decoder.bias": torch.tensor(-2.0)}, folder / "artifacts/vision/model.safetensors")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "POPEN_"))}
    done = subprocess.run(
        [sys.executable, "-m", "popen.stages.sft"],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes: 2, threads in each: 1") == 1
    assert Segmenter.load(folder / "artifacts/models/sft").params == mini_model.params


def test_who_is_two_processes_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = load(ROOT / "params.yaml").model_dump()
    params = Params.model_validate(raw)
    raw["sft"]["train"]["images"] = 3
    few = Params.model_validate(raw)
    raw["sft"]["train"]["images"], raw["model"]["language"]["name"] = 4, "a/model"
    named = Params.model_validate(raw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert [sft.usual(one) for one in (params, few, named)] == [2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sft.usual(params) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sft.usual(params) == 1


def test_two_devices_leave_what_one_leaves(
    taught: Segmenter, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    pairs = texts(taught, data)
    one, two = (clone(tmp_path / name, taught, data) for name in ("one", "two"))

    def work() -> None:
        folder = two if os.environ["WORLD_SIZE"] == "2" else one
        os.chdir(folder)
        mask_preferences.main()
        evaluate.main("muse_val", "popen")

    def aligned() -> None:
        os.environ["POPEN_SHARD"] = "1"
        os.chdir(two if os.environ["WORLD_SIZE"] == "2" else one)
        align.main("coarse")

    for folder, count in ((one, 1), (two, 2)):
        write_records(folder / "artifacts/preferences/text.jsonl", pairs)
        together(work, count, grouped=False)
        together(aligned, count)
    for file in ("masks_coarse/pairs.safetensors", "masks_fine/pairs.safetensors", "masks_fine/pairs.json"):
        assert (one / "artifacts/preferences" / file).read_bytes() == (
            two / "artifacts/preferences" / file
        ).read_bytes()
    answered = "artifacts/evaluate/muse_val/popen/predictions.jsonl.gz"
    said = [[replace(p, seconds=0.0) for p in read_predictions(folder / answered)] for folder in (one, two)]
    assert said[0] == said[1]
    figures = [json.loads((folder / "metrics/muse_val/popen.json").read_text()) for folder in (one, two)]
    assert figures[0] == figures[1]
    assert figures[0]["questions"] == 4
    models = [load_file(folder / "artifacts/models/coarse/model.safetensors") for folder in (one, two)]
    before = load_file(one / "artifacts/models/sft/model.safetensors")
    assert models[0].keys() == models[1].keys() == before.keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, atol=5e-5, rtol=1e-5)
    assert any(not torch.equal(before[name], value) for name, value in models[0].items())
    assert [sorted(path.name for path in (folder / ".checkpoints").iterdir()) for folder in (one, two)] == [
        [],
        [],
    ]
    for first, second in zip(runs(one), runs(two), strict=True):
        assert (first.data.tags["stage"], first.info.status) == (second.data.tags["stage"], "FINISHED")
        # the first step's margins are rounding alone: who wins is not compared
        assert first.data.metrics.keys() == second.data.metrics.keys()
        close = {
            name: pytest.approx(value, rel=1e-4, abs=1e-4)
            for name, value in first.data.metrics.items()
            if not name.endswith("accuracies")
        }
        assert {name: second.data.metrics[name] for name in close} == close


def test_what_is_no_number_of_devices_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "popen.stages.text_preferences"],
        cwd=tmp_path,
        env=os.environ | {"POPEN_DEVICES": "two", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "text_preferences: error: POPEN_DEVICES is 'two'; give the number of devices, as POPEN_DEVICES=8\n"
    )
