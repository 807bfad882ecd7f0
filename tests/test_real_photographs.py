"""Real photographs in all four layouts through the stages: contract, training, evaluation, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from popen.data import contract
from popen.samples import read_index
from popen.stages import evaluate, pretrain_vision, report, sft, validate
from popen.stages.run import QUIET
from tests.data.test_tree import REAL, needs_real
from tests.data.trees import STRICT

PARAMS = Path(__file__).parents[1] / "params.yaml"
SPLITS = {
    "train": ["muse/train", "refcoco/train", "refcoco+/train", "reasonseg/train", "grandf/train"],
    "val": ["muse/val", "refcoco/val", "reasonseg/val", "grandf/val"],
    "muse_val": ["muse/val"],
    "muse_test_less": ["muse/test_less"],
    "muse_test_many": ["muse/test_many"],
    "refcoco": ["refcoco/testA", "refcoco/testB"],
    "refcoco+": ["refcoco+/testA", "refcoco+/testB"],
    "reasonseg": ["reasonseg/val"],
    "grandf": ["grandf/val"],
}
BENCHMARKS = [role for role in SPLITS if role not in ("train", "val")]


def miniature() -> dict[str, Any]:
    """The project's own parameters, everything small but the photographs."""
    params: dict[str, Any] = yaml.safe_load(PARAMS.read_text())
    params["data"] |= {"root": str(REAL / "coco"), "splits": SPLITS}
    params |= {"benchmarks": BENCHMARKS, "systems": ["sft"]}
    model = params["model"]
    model["vision"] |= {"name": "timm:test_resnet", "image_size": 64, "levels": [2, 1]}
    model["language"] |= {"vocab": 600, "width": 32, "layers": 2, "heads": 2, "intermediate": 64}
    model["language"]["max_length"] = 512
    model["decoder"] |= {"width": 16, "heads": 2, "layers": 1, "detail": 4}
    params["pretrain_vision"] |= {"images": 4, "steps": 40, "checkpoint_every": 99}
    params["sft"]["questions"] = 2
    params["sft"]["train"] |= {"images": 4, "steps": 50, "checkpoint_every": 99}
    params["sft"]["vision"] = 1.0  # its tower has hardly been trained before
    params["sft"]["loss"] |= {"bce": 0.0, "dice": 4.0}  # masks in a few steps: without bce, large ones first
    params["evaluate"] |= {"batch": 16, "max_new_tokens": 16, "bootstrap": 20}
    return params


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC root with the parameters and nothing else."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(miniature()))
    monkeypatch.chdir(tmp_path)
    for name in (*QUIET, "HF_HUB_OFFLINE"):  # the stages set them: take them back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "POPEN_DEBUG", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")  # no Java: METEOR would take seconds
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("where", [pytest.param("coco", marks=needs_real)])
def test_from_the_contract_to_the_report(where: str, project: Path) -> None:
    validate.main()
    pretrain_vision.main()
    sft.main()
    thresholds = project / "artifacts/thresholds.json"
    thresholds.write_text(json.dumps({"sft": 0.0}))  # `calibrate` would need all four models
    for benchmark in BENCHMARKS:
        evaluate.main(benchmark, "sft")
    report.main()

    layouts = {sample.benchmark for sample in read_index(project / "artifacts/index/train.jsonl")}
    assert layouts == {"muse", "refcoco", "refcoco+", "reasonseg", "grandf"}
    losses = [
        float(line.rpartition(",")[2])
        for line in (project / "artifacts/curves/sft.csv").read_text().splitlines()
        if ",train/loss," in line
    ]
    assert losses[0] > losses[1] > losses[2] > 0  # steps 10, 20, 30
    summary = json.loads((project / "metrics/summary.json").read_text())
    for benchmark in BENCHMARKS:
        asked = list(read_index(project / f"artifacts/index/{benchmark}.jsonl"))
        figures = summary[benchmark]["sft"]
        assert figures["questions"] == len(asked) > 0
        assert 0 <= figures["gIoU"] <= 1
        assert 0 <= figures["teacher_forced/gIoU"] <= 1
        assert ("per_target/gIoU" in figures) == benchmark.startswith("muse")
    assert max(summary[benchmark]["sft"]["teacher_forced/gIoU"] for benchmark in BENCHMARKS) > 0.02
    text = (project / "reports/results.md").read_text()
    assert "| grandf | sft |" in text.partition("## As the peers measure")[2]


@pytest.mark.parametrize("where", [pytest.param("coco", marks=needs_real)])
def test_refcocog_is_tested_on_photographs_that_refcoco_trains_on(where: str) -> None:
    """As in the published splits: the contract refuses to measure the one with the other in training."""
    roles = {"train": ["refcoco/train"], "val": ["muse/val"], "refcocog": ["refcocog/test"]}
    with pytest.raises(contract.ContractError, match="3 images are in both 'train' and 'refcocog'"):
        contract.validate(REAL / where, roles, 2**20, STRICT)
    alone = contract.validate(REAL / where, roles | {"train": ["refcocog/train"]}, 2**20, STRICT)
    assert len(alone.samples["refcocog"]) == 27
