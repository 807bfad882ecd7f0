"""When a refused challenger is judged again. What else `retrain` does: tests/flows/test_retraining.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from popen import params as parameters
from popen.promotion.challenge import _refused

PARAMS = parameters.load(Path(__file__).parents[2] / "params.yaml")
RULES = PARAMS.gate.model_dump(mode="json")


def version(number: int, **verdict: Any) -> ModelVersion:
    told = {"passed": False, "against": "1", "gate": RULES} | verdict
    return ModelVersion("popen", str(number), 0, tags=[ModelVersionTag("gate", json.dumps(told))])


@pytest.mark.parametrize(
    ("verdict", "champion", "again"),
    [
        ({}, 1, False),
        ({"passed": True}, 1, True),
        ({}, 3, True),  # another champion
        ({"gate": RULES | {"gain": {"gIoU": 0.5}}}, 1, True),
        ({"gate": None}, 1, True),  # written before the rules were kept
    ],
)
def test_a_refused_one_is_judged_again_where_champion_or_gate_changed(
    verdict: dict[str, Any], champion: int, again: bool
) -> None:
    assert _refused(version(2, **verdict), version(champion), PARAMS) is not again


def test_one_that_was_never_judged_is() -> None:
    assert not _refused(ModelVersion("popen", "2", 0), version(1), PARAMS)
