"""The whole pipeline in miniature: a clone of the project, a small tree of scenes, real `dvc repro`."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from popen.data.scenes import export
from popen.evaluation.peers import PEERS
from popen.params import NoiseParams, ScenesParams

ROOT = Path(__file__).parents[2]
SCENES = ScenesParams(
    seed=3,
    size=64,
    train=24,
    preference=16,
    val=8,
    test=6,
    noise=NoiseParams(absent_mentioned=0.5, present_dropped=0.1, mask_coarse=0.4),
)
FEW = {"train": 4, "val": 2, "test": 3}  # images of ReasonSeg and GranD_f
BENCHMARKS = ["muse_test_less"]  # a process a system takes seconds: several benchmarks are test_report's
SYSTEMS = ["sft", "control", "chosen", "popen", "popen+ensemble"]
STAGES = {
    *(
        "validate",
        "pretrain_vision",
        "sft",
        "text_preferences",
        "mask_preferences",
        "control",
        "chosen",
        "calibrate",
        "class_swap",
    ),
    *(f"align@{part}" for part in ("coarse", "fine")),
    *(f"evaluate@{benchmark}-{system}" for benchmark in BENCHMARKS for system in SYSTEMS),
    "report",
}


def miniature() -> dict[str, Any]:
    """The project's own parameters, everything small."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    splits = params["data"]["splits"]
    params["data"]["splits"] = {name: splits[name] for name in ("train", "preference", *BENCHMARKS)}
    params["data"]["splits"]["val"] = ["muse/val"]
    params["contract"] |= {"min_area": 1, "max_kind_share": 1.0}
    params |= {"benchmarks": BENCHMARKS, "systems": SYSTEMS}
    model = params["model"]
    model["vision"] |= {"name": "timm:test_resnet", "image_size": 32, "levels": [2, 1]}
    model["language"] |= {"vocab": 400, "width": 32, "layers": 2, "heads": 2, "intermediate": 64}
    model["decoder"] |= {"width": 16, "heads": 2, "layers": 1, "detail": 4}
    small = {"images": 4, "checkpoint_every": 40, "eval_every": 80}
    params["pretrain_vision"] |= small | {"steps": 60}  # statistics of its batch norm, which SFT keeps
    # enough for answers with masks: with 160 steps one seed left 1 fine pair, another none (260: 12 and 28)
    params["sft"]["train"] |= small | {"steps": 260, "lr": 0.01}
    params["sft"] |= {"questions": 4, "masks": 4}
    params["sft"]["vision"] = 1.0  # its tower has hardly been trained before
    # two stages of 64 pairs each: both see all 33
    params["align"]["train"] |= small | {"steps": 16, "lr": 0.001}
    params["text_preferences"]["samples"] = 1
    params["mask_preferences"] |= {"perturbed": 8, "sigma": 1.0, "margin": 0.0, "area_ratio": 1000.0}
    params["calibrate"] |= {"thresholds": [-1.0, 0.0], "questions": 6}
    params["ensemble"] |= {"members": 2, "steps": 2}
    params["evaluate"] |= {"batch": 32, "max_new_tokens": 24, "bootstrap": 50}
    return params


def environment() -> dict[str, str]:
    """Stages call `python`: this one. Nothing of the outer environment names a place for records."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "POPEN_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}


def run(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=clone, env=environment(), capture_output=True, text=True)


def repro(clone: Path, *words: str) -> str:
    """`dvc repro`, which must succeed; returns what it printed."""
    done = run(clone, "dvc", "repro", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def ran(said: str) -> list[str]:
    """The stages that ran, by what `dvc repro` printed."""
    return re.findall(r"Running stage '(.+)':", said)


def change(clone: Path, *keys: str, to: object) -> None:
    path = clone / "params.yaml"
    params = yaml.safe_load(path.read_text())
    group = params
    for key in keys[:-1]:
        group = group[key]
    group[keys[-1]] = to
    path.write_text(yaml.safe_dump(params))


def make_clone(folder: Path) -> Path:
    """A clone with the working tree's code, its own small tree and parameters."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", "--no-checkout", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "checkout", "-q", "HEAD", "--", ".", ":!samples"], cwd=clone, check=True)
    shutil.copytree(ROOT / "popen", clone / "popen", dirs_exist_ok=True)
    shutil.copy(ROOT / "dvc.yaml", clone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "REASON_IMAGES", FEW)
        patch.setattr(export, "GRAND_IMAGES", FEW)
        export.write_tree(clone / "samples", SCENES, progress=False)
    (clone / "params.yaml").write_text(yaml.safe_dump(miniature()))
    # else DVC leaves its locks and indices of this clone in a folder of the whole machine
    site = f"[core]\n    site_cache_dir = {clone.parent / 'site'}\n"
    (clone / ".dvc/config.local").write_text(site)
    return clone


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The clone after the first `dvc repro`, and what that printed."""
    clone = make_clone(tmp_path_factory.mktemp("pipeline"))
    return clone, repro(clone)


@pytest.fixture
def clone(first: tuple[Path, str]) -> Path:
    return first[0]


def records(clone: Path) -> list[Run]:
    """MLflow's runs, the oldest first."""
    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("popen")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def test_every_stage_runs_and_the_summary_is_complete(first: tuple[Path, str]) -> None:
    clone, said = first
    assert sorted(ran(said)) == sorted(STAGES)
    summary = json.loads((clone / "metrics/summary.json").read_text())
    assert set(summary) >= {*BENCHMARKS, "comparisons"}
    figures = {"gIoU", "cIoU", "gIoU_matched", "chair_i", "chair_s", "missing", "area_ratio", "questions"}
    for benchmark in BENCHMARKS:
        assert list(summary[benchmark]) == SYSTEMS
        asked = len((clone / f"artifacts/index/{benchmark}.jsonl").read_text().splitlines())
        for system in SYSTEMS:
            assert set(summary[benchmark][system]) == figures | set(PEERS)
            forced = summary[benchmark][system]["teacher_forced/gIoU"]
            assert forced is None if system == "popen+ensemble" else 0 <= forced <= 1
            assert summary[benchmark][system]["questions"] == asked > 0
            with gzip.open(clone / f"artifacts/evaluate/{benchmark}/{system}/predictions.jsonl.gz") as file:
                assert len(file.readlines()) == asked
    compared = {(c["system"], c["control"]) for c in summary["comparisons"]}
    assert compared >= {("popen", "control"), ("popen", "chosen"), ("popen+ensemble", "popen")}
    assert all(c["low"] <= c["difference"] <= c["high"] for c in summary["comparisons"])
    # the miniature answers with masks, so that the figures above are not those of silence
    assert any(summary[benchmark]["sft"]["area_ratio"] for benchmark in BENCHMARKS)


def test_reports_and_models_are_there(clone: Path) -> None:
    results = (clone / "reports/results.md").read_text()
    assert all(system in results for system in SYSTEMS)
    assert (clone / "reports/examples.html").stat().st_size > 10_000
    plots = {path.stem for path in (clone / "reports/plots").glob("*.png")}
    assert plots >= {"quality", "hallucination", "iou_histograms", "area_ratio", "ensemble"}
    assert plots >= {"training", "alignment", "rewards"}
    sizes = json.loads((clone / "metrics/ensemble.json").read_text())
    assert [row["members"] for row in sizes if row["mode"] == "attention"] == [1, 2, 4, 8]
    assert set(json.loads((clone / "artifacts/thresholds.json").read_text())) == {*SYSTEMS[:4]}
    weights = {p.parent.name: p.read_bytes() for p in clone.glob("artifacts/models/*/model.safetensors")}
    assert set(weights) == {"sft", "control", "chosen", "coarse", "popen"}
    assert len(set(weights.values())) == 5  # each of them was trained
    assert not list((clone / ".checkpoints").iterdir())  # nothing is left once the results are written


def test_the_control_trains_by_all_losses_of_sft(clone: Path) -> None:
    """A control that lacks some is a weaker one."""
    sft, control = (
        {name for name in (row.split(",")[1] for row in curve.read_text().splitlines()) if "train/" in name}
        for curve in (clone / "artifacts/curves/sft.csv", clone / "artifacts/curves/control.csv")
    )
    assert {"train/ce", "train/bce", "train/aim", "train/describe"} <= sft == control


def test_the_control_learns_at_its_share_of_the_others_rate(clone: Path) -> None:
    share = yaml.safe_load((clone / "params.yaml").read_text())["control"]["rate"]
    control, chosen = (
        [float(row.split(",")[2]) for row in curve.read_text().splitlines() if ",train/lr," in row]
        for curve in (clone / "artifacts/curves/control.csv", clone / "artifacts/curves/chosen.csv")
    )
    assert 0 < share < 1
    assert control
    assert control == pytest.approx([share * rate for rate in chosen])


def test_the_bundle_answers_on_the_command_line(clone: Path) -> None:
    image = next((clone / "samples/refer_seg/images/mscoco/images/train2014").iterdir())
    popen = ("python", "-c", "from popen.cli import main; main()")  # the clone's, not the one installed
    done = run(clone, *popen, "predict", str(image), "where is the cup?", "--ensemble", "2")
    assert done.returncode == 0, done.stderr
    record = json.loads((clone / f"{image.stem}_answer.json").read_text())
    assert record["answer"].count("{seg}") == len(record["masks"])
    assert (clone / f"{image.stem}_answer.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_has_one_parent_with_a_child_a_stage(clone: Path) -> None:
    (parent,) = (run for run in records(clone) if run.data.tags["stage"] == "pipeline")
    children = [r for r in records(clone) if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["stage"] for run in children) == sorted(STAGES)
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    by_stage = {run.data.tags["stage"]: run for run in children}
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip()
    data = yaml.safe_load((clone / "data.dvc").read_text())["outs"][0]["md5"]
    for run in children:
        assert run.data.tags["mlflow.source.git.commit"] == commit
        assert run.data.params["align.train.steps"] == "16"
        assert run.inputs is not None
        assert run.inputs.dataset_inputs[0].dataset.digest == run.data.tags["data"] == data
    assert by_stage["calibrate"].outputs is not None
    assert len(by_stage["calibrate"].outputs.model_outputs) == 1  # the bundle, ready to be served
    fine = by_stage["align@fine"].data.metrics
    assert {"train/loss", "train/L_t", "train/L_s", "train/anchor_ce", "rewards_s/margins"} <= set(fine)
    summary = json.loads((clone / "metrics/summary.json").read_text())
    logged = by_stage["report"].data.metrics["gIoU/muse_test_less/popen_plus_ensemble"]
    assert logged == pytest.approx(summary["muse_test_less"]["popen+ensemble"]["gIoU"])


def test_a_second_repro_has_nothing_to_do(clone: Path) -> None:
    before, began = len(records(clone)), time.monotonic()
    said = repro(clone)
    assert time.monotonic() - began < 60
    assert "Data and pipelines are up to date." in said
    assert "Running stage" not in said
    assert len(records(clone)) == before


@pytest.mark.parametrize(
    ("keys", "value", "expected"),
    [
        (("align", "beta_t"), 0.77, {"align@coarse", "align@fine"}),
        (("control", "rate"), 0.7, {"control"}),
        (("mask_preferences", "sigma"), 0.9, {"mask_preferences"}),
        (("ensemble", "temperature"), 0.9, {"calibrate"}),
        (("evaluate", "bootstrap"), 60, {"report"}),
    ],
)
def test_a_changed_parameter_concerns_what_depends_on_it(
    clone: Path, keys: tuple[str, ...], value: float, expected: set[str]
) -> None:
    before = (clone / "params.yaml").read_text()
    change(clone, *keys, to=value)
    assert set(json.loads(run(clone, "dvc", "status", "--json").stdout)) == expected
    (clone / "params.yaml").write_text(before)


def started(clone: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["dvc", "repro", *words],
        cwd=clone,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


@pytest.mark.slow
def test_of_two_pipelines_at_once_the_second_stops_and_nothing_is_lost(clone: Path) -> None:
    change(clone, "evaluate", "bootstrap", to=60)
    one = started(clone)
    wait_for(one, "report: started")
    two = run(clone, "dvc", "repro")
    assert one.stdout is not None
    assert one.poll() is None, "the first one ended before the second began"
    assert two.returncode != 0
    assert re.search(
        r"ERROR: .*(Unable to acquire lock|is busy, it is being blocked by)", two.stdout + two.stderr
    )
    rest = one.stdout.read()
    assert one.wait() == 0, rest
    assert ran(rest) == []  # it had nothing to do but the report, where the number of resamples counts
    assert "Data and pipelines are up to date." in repro(clone)
    assert [r.info.status for r in records(clone) if r.data.tags["stage"] == "report"] == ["FINISHED"] * 2


@pytest.mark.slow
def test_a_killed_stage_ends_with_the_same_weights(clone: Path) -> None:
    """The lock file holds hashes of weights and curves: after a kill and a second start it is the same."""
    before = (clone / "dvc.lock").read_bytes()
    again = ("--force", "--no-run-cache", "--single-item", "sft")  # else DVC would take it from its cache
    one = started(clone, *again)
    while not list(clone.glob(".checkpoints/sft-*/step-00000040")):
        assert one.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    (stage,) = (
        p for p in psutil.Process(one.pid).children(recursive=True) if "popen.stages.sft" in p.cmdline()
    )
    os.kill(stage.pid, signal.SIGKILL)
    said, _ = one.communicate()
    assert one.returncode != 0
    assert "failed to reproduce 'sft'" in said
    assert not list(clone.glob("artifacts/models/sft/model.safetensors"))

    assert re.search(r"sft: goes on from step (40|80|120)\b", repro(clone, *again))
    assert (clone / "dvc.lock").read_bytes() == before
    assert "Data and pipelines are up to date." in repro(clone)
    assert [r.info.status for r in records(clone) if r.data.tags["stage"] == "sft"] == [
        *("FINISHED", "KILLED", "FINISHED")
    ]
