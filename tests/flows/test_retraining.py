"""`retrain` as a real flow on a small project: real DVC, MLflow, contract and evaluation; ready-made weights
stand for training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from flows.pipeline import PipelineError
from flows.retraining import RetrainError, retrain
from popen import params as parameters
from popen.ensemble.attention import RefinementAttention
from popen.model.language import train_tokenizer
from popen.model.segmenter import Segmenter
from popen.predict import write_bundle
from popen.promotion import challenge, opponent, registry
from popen.promotion.gate import GateError, Verdict, judge
from popen.samples import Sample
from tests.conftest import CATEGORIES, mini_params
from tests.data.trees import MSCOCO
from tests.test_predict import SCORE, settings
from tests.waiting import until

pytestmark = pytest.mark.slow

Data = tuple[Path, list[Sample]]
ROOT = Path(__file__).parents[2]
MODEL, ANSWERS = "artifacts/models/popen+ensemble", "artifacts/evaluate/muse_val/popen+ensemble"
TRAIN = """
import json, shutil, time
from pathlib import Path
from popen.stages.model_record import log_model
from popen.stages.run import stage
with stage("calibrate") as run:
    while Path("hold.here").exists():
        Path("begun.here").touch()
        time.sleep(0.1)
    bundle = Path("artifacts/models/popen+ensemble")
    shutil.copytree(Path("weights", Path("weights/chosen").read_text()), bundle)
    Path("artifacts/thresholds.json").write_text(json.dumps({"popen": 0.0}))
    log_model(run, bundle)
"""
REPORT = """
import json
from pathlib import Path
figures = json.loads(Path("metrics/muse_val/popen+ensemble.json").read_text())
summary = {"muse_val": {"popen+ensemble": figures}, "comparisons": []}
Path("metrics/summary.json").write_text(json.dumps(summary))
"""
STAGES = {
    "validate": {
        "cmd": "python -m popen.stages.validate",
        "deps": ["data"],
        "params": ["data", "contract"],
        "outs": ["artifacts/index", "artifacts/contract"],
    },
    "calibrate": {
        "cmd": "python train.py",
        "deps": ["weights", "artifacts/index"],
        "outs": [MODEL, "artifacts/thresholds.json"],
    },
    "evaluate": {
        "cmd": ["python -m popen.stages.evaluate muse_val popen+ensemble", "python report.py"],
        "deps": [MODEL, "artifacts/thresholds.json", "artifacts/index"],
        "outs": [ANSWERS],
        "metrics": [
            {"metrics/muse_val/popen+ensemble.json": {"cache": False}},
            {"metrics/summary.json": {"cache": False}},
        ],
    },
}


def muse_record(sample: Sample) -> dict[str, Any]:
    things = [
        {"segmentation": region.rle, "bbox": [0, 0, 9, 9], "category_id": 1, "category_name": region.category}
        for region in sample.objects
    ]
    return {
        "file_name": Path(sample.image).name,
        "height": sample.height,
        "width": sample.width,
        "ann_list": things,
        "questions": [sample.question],
        "answers": [things[: len(sample.targets)]],
        "text_answers": [sample.answer],
        "question_kinds": ["use"],
    }


def write(root: Path, split: str, samples: list[Sample], pictures: Path) -> None:
    """A MUSE split in the project's source; images of `train` get a pixel that no other has."""
    from PIL import Image

    folder = root / "samples" / MSCOCO / "train2014"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "samples/muse").mkdir(exist_ok=True)
    records = []
    for number, sample in enumerate(samples):
        name = f"{split}_{number}.png"
        picture = Image.open(pictures / sample.image)
        if split == "train":
            picture.putpixel((0, 0), (number, 0, 0))
        picture.save(folder / name)
        records.append(muse_record(replace(sample, image=name)))
    (root / f"samples/muse/muse_{split}.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def project(taught: Segmenter, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone with a source of data, and good and bad weights to choose from."""
    root = tmp_path_factory.mktemp("retrain") / "project"
    (root / "weights").mkdir(parents=True)
    torch.manual_seed(0)
    bad = Segmenter(mini_params(), train_tokenizer(["USER: a ASSISTANT: b"] * 3, 300), CATEGORIES).eval()
    for name, model in (("good", taught), ("bad", bad)):
        model.save(root / "saved")
        attention = RefinementAttention(model.codebook.scales, model.params.decoder.width)
        chosen = replace(settings(members=1), threshold=0.0)
        write_bundle(root / "weights" / name, root / "saved", None, SCORE, attention, chosen)
        shutil.rmtree(root / "saved")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    roles = {"train": ["muse/train"], "val": ["muse/val"], "muse_val": ["muse/val"]}
    params["data"]["splits"] = roles
    params["contract"] |= {"max_kind_share": 1.0}
    params |= {"benchmarks": ["muse_val"], "systems": ["popen+ensemble"]}
    params["evaluate"] |= {"batch": 8, "max_new_tokens": 24, "bootstrap": 100}
    params["gate"] |= {"tolerated": {"gIoU": 0.01, "cIoU": 0.01}}  # the bad one may name nothing at all
    params["ensemble"] |= {"members": 1}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (root / "train.py").write_text(TRAIN)
    (root / "report.py").write_text(REPORT)
    (root / "weights/chosen").write_text("bad")
    (root / ".gitignore").write_text(".popen/\nmlflow.db*\nmlartifacts/\nartifacts/\nsamples/\n")
    pictures, samples = data
    write(root, "train", samples[:2], pictures)
    write(root, "val", samples, pictures)
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("MLFLOW_", "POPEN_", "DVC_")):
                patch.delenv(name)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(root)
        words = [["git", "init", "-q"], ["git", "config", "user.name", "test"]]
        words += [["git", "config", "user.email", "test@example.org"], ["dvc", "init", "-q"]]
        words.append(["dvc", "config", "core.site_cache_dir", str(root.parent / "site")])
        words.append(["dvc", "import-url", "-q", "samples", "data"])
        words += [
            ["sed", "-i", "/^frozen/d", "data.dvc"],
            ["git", "add", "-A"],
            ["git", "commit", "-qm", "1"],
        ]
        for command in words:
            subprocess.run(command, cwd=root, check=True)
        yield root
    mlflow.set_tracking_uri(before)


def named(root: Path) -> dict[str, str]:
    return registry.aliases(registry.connect(root))


def test_from_the_first_model_to_a_refused_one(
    project: Path, prefect: None, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, samples = data
    words = retrain(max_age_days=None)  # a bad model, and yet the first
    assert words.startswith("Version 1 is the champion.")
    assert "the first model, no champion yet" in words
    assert words.endswith("Made because there is no champion yet.")
    assert named(project) == {"champion": "1"}
    assert retrain().startswith("Nothing to do")
    again = challenge.challenge(project, project, "the answer to the promotion was lost")
    assert again.words.startswith("Version 1 is the champion already: these results are its own.\n\nPassed: ")

    (project / "weights/chosen").write_text("good")
    write(project, "train", samples[:3], pictures)
    words = retrain()
    assert words.startswith("Version 2 is the champion. Champion before: version 1.\n\nPassed: ")
    assert "the data is not that of the champion (version 1)" in words
    assert named(project) == {"champion": "2", "previous": "1"}

    (project / "weights/chosen").write_text("bad")
    write(project, "train", samples, pictures)
    lock = (project / "dvc.lock").read_bytes
    made = []

    def late(*rows: Any) -> Verdict:
        made.append(lock())
        (project / "dvc.lock").write_bytes(lock() + b"# another pipeline wrote here\n")
        return judge(*rows)

    with monkeypatch.context() as patch:
        patch.setattr(challenge, "judge", late)
        with pytest.raises(registry.RegistryError, match="changed while version 3 was judged"):
            retrain()
    (project / "dvc.lock").write_bytes(made[0])
    words = retrain()
    assert words.startswith("Version 3 stays a challenger. Champion before: version 2.\n\nRefused: ")
    assert "- BROKEN: gIoU_matched: " in words
    assert named(project) == {"champion": "2", "previous": "1", "challenger": "3"}
    assert on_the_page("retrain") == words

    def never(*_: Any) -> None:
        raise AssertionError("the champion was asked again")

    with monkeypatch.context() as patch:  # the data is still not the champion's
        patch.setattr(opponent, "champion_rows", never)
        again = challenge.challenge(project, project, "the next night")
        assert again.words.startswith(
            "Version 3 stays a challenger: the same champion and gate refused it before.\n\nRefused: "
        )
        ways = yaml.safe_load((project / "params.yaml").read_text())
        ways["gate"]["tolerated"]["gIoU"] = 0.02
        patch.setattr(challenge.parameters, "load", lambda _: parameters.Params(**ways))
        with pytest.raises(AssertionError, match="asked again"):  # another gate may say otherwise
            challenge.challenge(project, project, "the next night")

    client = registry.connect(project)
    version = client.get_model_version(registry.NAME, "2")
    assert version.tags["data"] != client.get_model_version(registry.NAME, "3").tags["data"]
    gate = json.loads(version.tags["gate"])
    assert gate["against"] == "1"
    assert f"gain {gate['checks'][0]['gain']:+.4f}" in str(version.description)
    experiment = client.get_experiment_by_name("popen")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'retrain'")
    assert [(r.info.status, r.data.tags.get("version")) for r in reversed(runs)] == [
        ("FINISHED", "1"),
        ("FINISHED", "1"),
        ("FINISHED", "2"),
        ("FAILED", None),
        ("FINISHED", "3"),
        ("FINISHED", "3"),
        ("FAILED", None),
    ]
    refused, passed = runs[2], runs[4]
    assert refused.data.metrics["gate/gIoU_matched/gain"] < 0 < passed.data.metrics["gate/gIoU_matched/low"]
    assert "Refused: " in mlflow.artifacts.load_text(f"{refused.info.artifact_uri}/verdict.md")


def on_the_page(key: str) -> str:
    """The newest artifact of this key. (Prefect's own `Artifact.get` sends empty filters and is refused.)"""
    with get_client(sync_client=True) as client:
        found = client.request("GET", "/artifacts/{key}/latest", path_params={"key": key})
    return str(found.json()["data"])


def test_data_that_breaks_the_contract_stops_before_training(
    project: Path, prefect: None, data: Data
) -> None:
    before = named(project)
    path = project / "samples/muse/muse_train.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0] | {"text_answers": ["The cup."]}, *records[1:]]))
    with pytest.raises(RetrainError) as caught:
        retrain(force=True)
    assert "the new data breaks its contract, nothing was trained and the champion stays" in str(caught.value)
    assert str(project / "artifacts/contract/report.html") in str(caught.value)
    assert "- muse/muse_train.json, record 0" in str(caught.value)
    assert on_the_page("contract") == str(caught.value)
    assert named(project) == before
    assert len(registry.versions(registry.connect(project))) == 3


def test_of_two_at_once_the_second_stops_and_a_killed_one_is_taken_up_again(
    project: Path, prefect: None, data: Data
) -> None:
    pictures, samples = data
    before = len(registry.versions(registry.connect(project)))
    write(project, "train", samples[1:], pictures)  # new, and sound again
    hold, begun = project / "hold.here", project / "begun.here"
    hold.touch()
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()}
    first = subprocess.Popen([sys.executable, "-m", "flows.retraining"], env=environment)
    until(begun.exists)
    with pytest.raises(RetrainError, match="another `retrain` is at work in this clone"):
        retrain()
    stages = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait(20)
    psutil.wait_procs(stages, 30)  # they end with it
    hold.unlink()
    assert "the data is not that of the champion" in retrain()
    assert len(registry.versions(registry.connect(project))) == before + 1
    with get_client(sync_client=True) as client:
        newest = {"sort": "START_TIME_DESC", "flows": {"name": {"any_": ["retrain"]}}}
        runs = client.request("POST", "/flow_runs/filter", json=newest).json()
    # the newest finished, the second was refused, the first was killed
    assert [run["state_name"] for run in runs[:3]] == ["Completed", "Failed", "Crashed"]


def test_a_stage_that_hangs_is_ended(project: Path, prefect: None) -> None:
    before = len(registry.versions(registry.connect(project)))
    with pytest.raises(PipelineError, match=r"^failed: "):
        retrain(force=True, stage_timeout=0.2)
    assert len(registry.versions(registry.connect(project))) == before


def test_a_gate_that_nothing_answers_stops_at_once(project: Path, prefect: None) -> None:
    path = project / "params.yaml"
    text = path.read_text()
    path.write_text(text.replace("benchmark: muse_val", "benchmark: refcoco"))
    try:
        with pytest.raises(
            GateError, match=r"gate\.benchmark: refcoco is not among the benchmarks \(muse_val\)"
        ):
            retrain()
    finally:
        path.write_text(text)
