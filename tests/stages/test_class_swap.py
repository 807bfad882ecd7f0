"""The stage `class_swap` measures the trained model in the precision of the evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from popen.model.segmenter import Segmenter
from popen.samples import Sample, write_index
from popen.stages import class_swap
from tests.conftest import square
from tests.stages.test_devices import clone


@pytest.mark.parametrize("half", [False, True])
def test_the_trained_model_is_measured(
    half: bool,
    taught: Segmenter,
    data: tuple[Path, list[Sample]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16, too: one that is loaded under autocast answers with the weights that it starts with."""
    for name in ("MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("popen.devices.halves", lambda: True)
    folder = clone(tmp_path, taught, data)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["benchmarks"], params["evaluate"]["bf16"] = ["muse_val"], half
    params["gate"]["benchmark"] = "muse_val"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "artifacts/thresholds.json").write_text('{"sft": 0.0}')
    twins = [replace(sample, objects=(*sample.objects, square(0, 16, 4))) for sample in data[1]]
    write_index(folder / "artifacts/index/muse_val.jsonl", twins)
    monkeypatch.chdir(folder)
    class_swap.main()
    found = json.loads((folder / "metrics/class_swap.json").read_text())
    assert found["targets"] > 0
    assert found["iou"] > 0.4  # it knows these questions by heart
