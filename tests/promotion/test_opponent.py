"""The champion's answers to the gate's questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from popen import devices
from popen import params as parameters
from popen.model.segmenter import Segmenter
from popen.params import Params
from popen.promotion import opponent
from popen.promotion.opponent import champion_rows
from popen.samples import Sample
from tests.promotion.conftest import ROOT
from tests.test_predict import placed


def asks(system: str) -> Params:
    """The gate asks this system, about data in the current folder."""
    params = parameters.load(ROOT / "params.yaml")
    return params.model_copy(
        update={
            "gate": params.gate.model_copy(update={"system": system}),
            "data": params.data.model_copy(update={"root": "."}),
        }
    )


@pytest.mark.parametrize("system", ["popen", "popen+ensemble"])
def test_the_champion_answers_every_question_and_is_loaded_once(
    system: str, weights: Path, data: tuple[Path, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, asked = data
    loaded, load = [], Segmenter.load

    def counted(folder: Path) -> Any:
        loaded.append(folder)
        return load(folder)

    monkeypatch.setattr(Segmenter, "load", counted)
    rows = champion_rows(weights, root, asks(system), asked)
    assert list(rows["uid"]) == [sample.uid for sample in asked]
    assert rows["iou"].mean() > 0.3  # it knows these questions by heart
    assert len(loaded) == 1


@pytest.mark.parametrize("system", ["popen", "popen+ensemble"])
def test_the_champion_answers_on_the_device_of_a_stage(
    system: str, weights: Path, data: tuple[Path, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without values stands for the GPU: it shows where the weights are, and can answer nothing."""

    class Asked(Exception):
        pass

    def ask(model: Any, *_: Any) -> None:
        assert placed(model) == {"meta"}
        raise Asked

    monkeypatch.setattr(devices, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(opponent, "answerer", ask)
    with pytest.raises(Asked):
        champion_rows(weights, data[0], asks(system), data[1])


@pytest.mark.parametrize("half", [True, False])
def test_the_champion_answers_in_the_precision_of_its_calibration(
    half: bool,
    weights: Path,
    data: tuple[Path, list[Sample]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the challenger's parameters say."""
    bundle, made, seen = shutil.copytree(weights, tmp_path / "bundle"), opponent.answerer, []
    settings = json.loads((bundle / "settings.json").read_text())
    (bundle / "settings.json").write_text(json.dumps(settings | {"bf16": half}))

    def watched(*args: Any) -> Any:
        ask = made(*args)

        def told(start: int) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return ask(start)

        return told

    monkeypatch.setattr(devices, "halves", lambda: True)
    monkeypatch.setattr(opponent, "answerer", watched)
    rows = champion_rows(bundle, data[0], asks("popen"), data[1])
    assert len(rows) == len(data[1])
    assert set(seen) == {half}
