"""The champion's answers to the gate's questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from popen import params as parameters
from popen.model.segmenter import Segmenter
from popen.promotion.opponent import champion_rows
from popen.samples import Sample
from tests.promotion.conftest import ROOT


@pytest.mark.parametrize("system", ["popen", "popen+ensemble"])
def test_the_champion_answers_every_question_and_is_loaded_once(
    system: str, weights: Path, data: tuple[Path, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, asked = data
    params = parameters.load(ROOT / "params.yaml")
    params = params.model_copy(
        update={
            "gate": params.gate.model_copy(update={"system": system}),
            "data": params.data.model_copy(update={"root": "."}),
        }
    )
    loaded, load = [], Segmenter.load

    def counted(folder: Path) -> Any:
        loaded.append(folder)
        return load(folder)

    monkeypatch.setattr(Segmenter, "load", counted)
    rows = champion_rows(weights, root, params, asked)
    assert list(rows["uid"]) == [sample.uid for sample in asked]
    assert rows["iou"].mean() > 0.3  # it knows these questions by heart
    assert len(loaded) == 1
