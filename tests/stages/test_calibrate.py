"""The stage `calibrate`: choosing a threshold."""

from __future__ import annotations

import pytest
import torch

from popen.masks import decode
from popen.model.generate import Answer
from popen.samples import Sample
from popen.stages.calibrate import best_threshold


def found(sample: Sample, inside: float, outside: float) -> tuple[Sample, Answer, float]:
    """The cup's mask has the logit `inside`, a margin as large as it `outside`, the rest -9."""
    mask = torch.from_numpy(decode(sample.targets[0].rle))
    logits = torch.full((1, 32, 32), -9.0)
    logits[0, 24:29] = outside
    logits[0, mask] = inside
    return sample, Answer("It is the cup {seg}.", [1], -0.5, torch.zeros(1, 2, 4), logits), 0.1


@pytest.fixture
def cup(sample: Sample) -> Sample:
    return Sample(**{**vars(sample), "targets": sample.targets[:1], "answer": "It is the cup {seg}."})


def test_the_threshold_with_the_best_giou_wins(cup: Sample) -> None:
    levels = [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert best_threshold([found(cup, 1.5, 0.5)], levels) == (1.0, 1.0)  # the only one between the two
    low, value = best_threshold([found(cup, -1.5, -3.0)], levels)
    assert (low, value) == (-2.0, 1.0)


def test_of_equals_the_one_closest_to_zero_wins(cup: Sample) -> None:
    assert best_threshold([found(cup, 3.0, -5.0)], [-2.0, -0.5, 1.0]) == (-0.5, 1.0)


def test_giou_is_that_of_all_questions(cup: Sample) -> None:
    other = Sample(**{**vars(cup), "uid": "muse/train/0/1"})
    level, value = best_threshold([found(cup, 1.5, 0.5), found(other, 0.2, -3.0)], [0.0, 1.0])
    # at 0: 100 of 260 pixels and all of them; at 1: all of them and none
    assert (level, value) == (0.0, pytest.approx((100 / 260 + 1) / 2))
