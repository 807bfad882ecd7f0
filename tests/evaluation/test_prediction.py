"""The prediction file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from popen.evaluation.prediction import EvaluationError, Prediction, read_predictions, write_predictions
from popen.masks import encode

RLE = encode(np.eye(4, dtype=bool))


def test_round_trip_to_the_same_bytes(tmp_path: Path) -> None:
    predictions = [
        Prediction("muse/val/0/0", "Die Tasse – „rot“ {seg}\nund {seg}", (RLE, RLE), -0.25, 0.875, 0.5),
        Prediction("muse/val/0/1", "Nothing.", (), -1.0, 1.0, 0.25),
    ]
    one, two = tmp_path / "a" / "p.jsonl.gz", tmp_path / "b" / "q.jsonl.gz"
    assert write_predictions(one, predictions) == 2
    write_predictions(two, iter(predictions))
    assert list(read_predictions(one)) == predictions
    assert one.read_bytes() == two.read_bytes()


def test_words_decide_how_many_masks_there_are() -> None:
    with pytest.raises(
        EvaluationError, match=r"muse/val/0/0: the text holds 2 \{seg\} but there are 1 masks"
    ):
        Prediction("muse/val/0/0", "A {seg} and {seg}", (RLE,), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("line", ["{", '{"uid": "x"}', '{"uid": "x", "masks": 3}', "[]"])
def test_a_broken_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl.gz"
    write_predictions(path, [Prediction("u", "Nothing.", (), 0.0, 0.0, 0.0)])
    with gzip.open(path, "at", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(EvaluationError, match=r"p\.jsonl\.gz, line 2: not a prediction"):
        list(read_predictions(path))
