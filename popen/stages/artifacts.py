"""Where the stages' results lie, below the project's root."""

from __future__ import annotations

import json
from pathlib import Path

from popen.samples import Sample, read_index

CONTRACT = Path("artifacts/contract")
INDEX = Path("artifacts/index")
VISION = Path("artifacts/vision")
MODELS = Path("artifacts/models")
BUNDLE = MODELS / "popen+ensemble"
PREFERENCES = Path("artifacts/preferences")
TEXT_PAIRS = PREFERENCES / "text.jsonl"
THRESHOLDS = Path("artifacts/thresholds.json")
CURVES = Path("artifacts/curves")


class MissingError(RuntimeError):
    """What an earlier stage makes is not there; the message names the stage."""


def index(role: str) -> Path:
    """The validated samples of a role, a file."""
    return INDEX / f"{role}.jsonl"


def samples(role: str) -> list[Sample]:
    """The validated samples of a role. Raises MissingError."""
    path = index(role)
    if not path.is_file():
        raise MissingError(
            f"{path}: no such file; run the stage validate first (dvc repro validate), with a role {role} in "
            "data.splits"
        )
    return list(read_index(path))


def predictions(benchmark: str, system: str) -> Path:
    """A system's answers to a benchmark, a file."""
    return Path("artifacts/evaluate") / benchmark / system / "predictions.jsonl.gz"


def threshold(system: str) -> float:
    """The mask threshold (a logit) that `calibrate` chose for a system on validation."""
    return float(json.loads(THRESHOLDS.read_text(encoding="utf-8"))[system.removesuffix("+ensemble")])
