"""The stage `calibrate`: batches that are kept, choosing a threshold, comparing members."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from popen.evaluation.prediction import Prediction
from popen.masks import decode
from popen.model.generate import Answer
from popen.samples import Sample
from popen.stages.calibrate import Shared, best_threshold, compared, spread
from popen.stages.run import Run


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


def test_questions_of_every_part_of_validation_are_asked() -> None:
    val = [*(("muse", n) for n in range(600)), *(("refcoco", n) for n in range(400)), ("grandf", 0)]
    asked = spread(val, 300)
    assert len(asked) == len(set(asked)) == 300
    assert asked == sorted(asked, key=val.index)
    assert abs(sum(name == "muse" for name, _ in asked) - 300 * 600 / 1001) <= 1
    assert spread(val, 2000) == val
    assert spread([], 3) == []


def test_batches_are_made_once_and_their_tensors_kept_once(run: Run) -> None:
    made: list[int] = []

    def make(number: int) -> list[Tensor]:
        made.append(number)
        return list(torch.full((50, 1000), float(number)))  # 50 parts of one tensor, as answers' masks are

    def told(shared: Shared, setting: int) -> list[float]:
        return [float(part[0]) for part in shared("test", [Path("input")], [setting], range(2), make)]

    shared = Shared(run, 1)
    assert told(shared, 1) == [0.0] * 50 + [1.0] * 50
    written = sum(file.stat().st_size for file in Path(".checkpoints").rglob("batch-*"))
    assert 2 * 200_000 < written < 2 * 250_000
    assert told(Shared(run, 1), 1) == [0.0] * 50 + [1.0] * 50  # the stage starts again
    assert made == [0, 1]
    other = Shared(run, 1)
    told(other, 2)
    assert made == [0, 1, 0, 1]
    shared.clear()
    other.clear()
    assert not list(Path(".checkpoints").rglob("batch-*"))


def test_cores_make_the_same_batches(run: Run) -> None:
    for cores in (1, 2, 3):
        shared = Shared(run, cores)
        found = shared("test", [Path("input")], [cores], range(7), lambda number: [number, -number])
        assert found == [sign * number for number in range(7) for sign in (1, -1)]


@pytest.mark.parametrize("half", [True, False])
def test_answers_are_made_in_the_precision_of_the_evaluation(
    half: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popen.devices.halves", lambda: True)
    evaluate = run.params.evaluate.model_copy(update={"bf16": half})
    run.params = run.params.model_copy(update={"evaluate": evaluate})
    shared = Shared(run, 1)
    assert (
        shared("precision", [], [], range(2), lambda number: [torch.is_autocast_enabled("cpu")]) == [half] * 2
    )
    shared.clear()


def test_members_and_modes_are_compared_each_by_its_own_answers(cup: Sample) -> None:
    right = Prediction(cup.uid, "It is the cup {seg}.", (cup.targets[0].rle,), 0.0, 1.0, 0.2)
    wrong = Prediction(cup.uid, "It is the fork {seg}.", (cup.objects[1].rle,), 0.0, 1.0, 0.4)
    table = compared([cup], [(4, "mean", wrong), (1, "attention", right), (4, "attention", right)])
    assert [(row["members"], row["mode"], row["seconds"]) for row in table] == [
        (1, "attention", 0.2),
        (4, "attention", 0.2),
        (4, "mean", 0.4),
    ]
    assert [row["gIoU"] for row in table] == [1.0, 1.0, 0.0]
    assert [row["missing"] for row in table] == [0.0, 0.0, 1.0]
