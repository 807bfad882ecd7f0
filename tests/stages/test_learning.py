"""What surrounds the training loop: checkpoints by fingerprint, and no training lost to a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from popen.model.losses import cross_entropy
from popen.params import TrainParams
from popen.samples import Sample
from popen.stages.learning import (
    both_stages,
    fit,
    image_plan,
    pair_plan,
    sample_row,
    sft_collate,
    validation,
)
from popen.stages.run import Run
from tests import test_training as toys
from tests.conftest import WEIGHTS

PARAMS = toys.PARAMS.model_copy(update={"steps": 12, "checkpoint_every": 5})


def start(
    run: Run, model: nn.Module, save: Callable[[], None], make: Any = toys.item, params: TrainParams = PARAMS
) -> None:
    fit(run, model, params, make, toys.collate, toys.loss, None, [Path("input")], [WEIGHTS], save)


def saves(model: nn.Module) -> Callable[[], None]:
    return lambda: torch.save(model.state_dict(), "result")


def checkpoints() -> list[str]:
    return sorted(path.name for path in Path(".checkpoints").glob("*/*"))


def test_curves_and_result_are_written_and_the_checkpoints_removed(run: Run) -> None:
    model = toys.toy()
    seen: list[list[str]] = []

    def save() -> None:
        seen.append(checkpoints())  # still there while the result is being written
        saves(model)()

    start(run, model, save)
    assert seen == [["step-00000005", "step-00000010"]]
    assert checkpoints() == []
    lines = Path("artifacts/curves/align_coarse.csv").read_text().splitlines()
    assert lines[0] == "step,name,value"
    assert {line.split(",")[1] for line in lines[1:]} == {
        *("train/loss", "train/part", "train/grad_norm", "train/lr")
    }


def test_a_result_that_cannot_be_saved_costs_no_training(run: Run) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        start(run, toys.toy(), full)
    asked: list[int] = []

    def watch(index: int) -> Any:
        asked.append(index)
        return toys.item(index)

    resumed, straight = toys.toy(), toys.toy()
    start(run, resumed, saves(resumed), watch)
    assert min(asked) == 10 * PARAMS.images  # goes on from the last checkpoint
    shutil.rmtree(".checkpoints")
    torch.manual_seed(0)
    straight = toys.toy()
    start(run, straight, saves(straight))
    assert toys.equal(toys.state(resumed), toys.state(straight))


def test_controls_get_the_steps_of_both_stages() -> None:
    assert both_stages(PARAMS) == PARAMS.model_copy(update={"steps": 24})


def test_plans(data: tuple[Path, list[Sample]]) -> None:
    samples = data[1]
    plan = pair_plan(samples, 0)
    assert sorted(plan(index).uid for index in range(4)) == sorted(sample.uid for sample in samples)
    behind = pair_plan(samples, 0, 3)
    assert [behind(index).uid for index in range(6)] == [plan(index).uid for index in range(3, 9)]
    twice = image_plan([*samples, *samples], 2, 0)
    assert all(len(twice.item(index)) == 2 for index in range(8))
    assert {sample.image for sample in twice.item(3)} == {twice.item(3)[0].image}


def test_a_sample_becomes_a_supervised_row(sample: Sample) -> None:
    row = sample_row(sample, 3)
    assert (row.image, row.question, row.answer, row.ignore) == (3, sample.question, sample.answer, None)
    assert row.masks is not None
    assert [int(mask.sum()) for mask in row.masks] == [100, 64]


def test_of_the_first_samples_of_an_item_the_masks_are_drawn(
    run: Run, mini_model: Any, data: tuple[Path, list[Sample]]
) -> None:
    root = run.params.data.model_copy(update={"root": str(data[0])})
    run.params = run.params.model_copy(update={"data": root})
    item = [data[1][0], data[1][0]]
    batch = sft_collate(mini_model, run, 1, auxiliary=True)([item, item])
    assert batch.row_of_target.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]  # two targets in each answer
    assert batch.of_drawn(batch.row_of_target).tolist() == [0, 0, 2, 2]
    assert batch.answered.any(1).all()
    assert batch.inventory is not None
    assert batch.inventory.sum(1).tolist() == [2, 2, 2, 2]
    bare = sft_collate(mini_model, run, 2, auxiliary=False)([item, item])
    assert bare.inventory is None
    assert bare.dense is None
    assert bare.of_drawn(bare.row_of_target).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    one = item[0].targets[:1]
    refers = replace(item[0], benchmark="refcoco+", answer="it is the cup {seg}.", targets=one)
    mixed = sft_collate(mini_model, run, 1, auxiliary=False)([[*item, refers]])
    assert mixed.of_drawn(mixed.row_of_target).tolist() == [0]  # the one that refers to a thing comes first
    assert mixed.row_of_target.tolist() == [0, 1, 1, 2, 2]


def test_validation_is_of_what_the_model_knows(
    run: Run, taught: Any, mini_model: Any, data: tuple[Path, list[Sample]]
) -> None:
    """The taught model against an untrained one, on the questions that it was taught."""
    figures = []
    for model in (taught, mini_model):
        root = run.params.data.model_copy(update={"root": str(data[0])})
        run.params = run.params.model_copy(update={"data": root})
        figures.append(validation(model, run, data[1])())
    known, unknown = figures
    assert set(known) == {"val_teacher_forced/ce_muse", "val_teacher_forced/iou_muse"}
    assert known["val_teacher_forced/ce_muse"] < 1.0 < unknown["val_teacher_forced/ce_muse"]
    assert known["val_teacher_forced/iou_muse"] > 0.4 > unknown["val_teacher_forced/iou_muse"]


def test_validation_tells_benchmarks_apart(run: Run, taught: Any, data: tuple[Path, list[Sample]]) -> None:
    """By hand: the mean over a kind's tokens, whatever the other kinds' are."""
    root = run.params.data.model_copy(update={"root": str(data[0])})
    run.params = run.params.model_copy(update={"data": root})
    asked = data[1][0]
    cup = asked.targets[:1]
    odd = replace(asked, uid="odd", benchmark="refcoco+", answer="it is the cup {seg}.", targets=cup)
    silent = replace(asked, uid="silent", benchmark="grandf", answer="Nothing.", targets=())
    found = validation(taught, run, [asked, odd, silent])()
    assert set(found) == {
        f"val_teacher_forced/{name}"
        for name in ("ce_muse", "iou_muse", "ce_refcoco", "iou_refcoco", "ce_grandf")
    }
    for kind, sample in (("muse", asked), ("refcoco", odd), ("grandf", silent)):
        batch = sft_collate(taught, run, 1, auxiliary=False)([[sample]])
        with torch.no_grad():
            by_hand = cross_entropy(taught(batch).logits, batch)
        assert found[f"val_teacher_forced/ce_{kind}"] == pytest.approx(float(by_hand), rel=1e-4)
