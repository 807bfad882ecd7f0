"""The stages one after the other on a LLaVA-1.5 in small, read from a folder as the hub has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from popen.evaluation.prediction import read_predictions
from popen.masks import decode, encode
from popen.preference.records import read_text_pairs
from popen.samples import Sample, write_index
from popen.stages import (
    align,
    calibrate,
    chosen,
    class_swap,
    control,
    evaluate,
    mask_preferences,
    pretrain_vision,
    sft,
    text_preferences,
)
from tests.model.llava import llava_params, write_llava, write_tower
from tests.test_conf import compose

pytestmark = pytest.mark.slow

SYSTEMS = ["sft", "control", "chosen", "popen", "popen+ensemble"]


def project(folder: Path, data: tuple[Path, list[Sample]]) -> Path:
    """A DVC root with the parameters of conf/model/llava-7b.yaml, but for what follows, and the indices of
    four drawn images."""
    root, samples = data
    llava = write_llava(folder / "llava")
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = llava_params(
        folder / "llava",
        write_tower(llava, folder),
        lora_r=8,
        lora_targets=everywhere,  # a language model that knows nothing yet
        checkpointing=True,
    )
    home = folder / "project"
    (home / ".dvc").mkdir(parents=True)
    params = compose(home / "params.yaml", "model=llava-7b", "data=muse").model_dump(mode="json")
    params["model"] = model.model_dump(mode="json")
    params["data"] |= {"root": str(root), "splits": {name: ["muse/train"] for name in ("val", "muse_val")}}
    params |= {"benchmarks": ["muse_val"], "systems": SYSTEMS}
    small = {"warmup": 0.1, "accumulate": 1, "images": 4, "checkpoint_every": 1000, "eval_every": 1000}
    params["sft"]["train"] |= small | {"steps": 200, "lr": 0.01}
    params["align"]["train"] |= small | {"steps": 3, "lr": 0.001}
    params["text_preferences"] |= {"samples": 1, "temperature": 0.5}
    params["mask_preferences"] |= {"perturbed": 16, "sigma": 1.0, "margin": 0.0, "area_ratio": 1000.0}
    params["calibrate"] |= {"thresholds": [-1.0, 0.0], "questions": 4}
    params["ensemble"] |= {"members": 2, "steps": 2}
    params["evaluate"] |= {"batch": 2, "max_new_tokens": 32, "bootstrap": 20}
    (home / "params.yaml").write_text(yaml.safe_dump(params))
    for role in ("preference", "val", "muse_val"):
        write_index(home / f"artifacts/index/{role}.jsonl", samples)
    write_index(home / "artifacts/index/train.jsonl", [shifted(sample) for sample in samples])
    return home


def shifted(sample: Sample) -> Sample:
    """With masks that lie beside their things, as in a careless corpus: a model that has learnt these can do
    better, which is what P_s asks for."""
    moved = [np.roll(decode(target.rle), 2, axis=1) for target in sample.targets]
    targets = tuple(
        replace(target, rle=encode(mask)) for target, mask in zip(sample.targets, moved, strict=True)
    )
    return replace(sample, targets=targets)


def test_every_stage_runs_on_a_llava(
    data: tuple[Path, list[Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    home = project(tmp_path, data)
    monkeypatch.chdir(home)
    pretrain_vision.main()
    sft.main()
    text_preferences.main()
    mask_preferences.main()
    align.main("coarse")
    align.main("fine")
    control.main()
    chosen.main()
    calibrate.main()
    class_swap.main()
    for system in SYSTEMS:
        evaluate.main("muse_val", system)

    assert (home / "artifacts/vision/skipped.txt").exists()  # the tower has weights of its own
    pairs = list(read_text_pairs(home / "artifacts/preferences/text.jsonl"))
    assert {pair.uid for pair in pairs} == {sample.uid for sample in data[1]}
    states = {name: load_file(home / f"artifacts/models/{name}/model.safetensors") for name in SYSTEMS[:4]}
    names = set(states["sft"])
    assert any("lora_" in name for name in names)
    assert any(name.startswith("projector.") for name in names)
    assert not any(name.startswith("tower.") for name in names)  # open_clip's, which nothing trained
    for name in SYSTEMS[1:4]:
        assert set(states[name]) == names
        moved = [key for key in names if not states[name][key].equal(states["sft"][key])]
        assert any("lora_" in key for key in moved)
        assert any(key.startswith("decoder.") for key in moved)
    for system in SYSTEMS:
        figures = json.loads((home / f"metrics/muse_val/{system}.json").read_text())
        assert figures["questions"] == 4
        told = list(read_predictions(home / f"artifacts/evaluate/muse_val/{system}/predictions.jsonl.gz"))
        assert [one.uid for one in told] == [sample.uid for sample in data[1]]
        assert any(one.masks for one in told)  # the model has learnt to answer with targets
