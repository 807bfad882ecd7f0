"""The training loop on toy modules: arithmetic, resuming, and what stops it."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from popen import devices
from popen.checkpoints import CheckpointError, Checkpoints
from popen.params import TrainParams
from popen.training import DivergedError, Items, train

PARAMS = TrainParams(
    steps=25,
    images=4,
    accumulate=1,
    lr=0.05,
    muon=0.0,
    warmup=0.2,
    weight_decay=0.1,
    clip=0.5,
    checkpoint_every=7,
    eval_every=9,
)


@dataclass(frozen=True)
class Numbers:
    x: Tensor  # (B, 3)
    indices: list[int]

    def to(self, device: object) -> Numbers:
        return self


def item(index: int) -> tuple[int, Tensor]:
    return index, torch.randn(3, generator=torch.Generator().manual_seed(index))


def collate(items: Sequence[tuple[int, Tensor]]) -> Numbers:
    return Numbers(torch.stack([x for _, x in items]), [index for index, _ in items])


def loss(model: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
    error = (model(batch.x)[:, 0] - batch.x.prod(1)).pow(2).mean()
    return error, {"part": error.detach() / 2}


def toy(dropout: float = 0.5) -> nn.Module:
    """With everything that has a state: dropout draws random numbers, batch norm keeps statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8) if dropout else nn.Identity(), nn.Dropout(dropout), nn.Linear(8, 1)
    )


Points = list[tuple[int, dict[str, float]]]


def run(
    model: nn.Module,
    folder: Path,
    make: Callable[[int], Any] = item,
    of: Any = loss,
    evaluate: Callable[[], dict[str, float]] | None = None,
    checkpoints: Checkpoints | None = None,
    **changes: Any,
) -> Points:
    """Train; returns what was logged."""
    points: Points = []
    train(
        model,
        PARAMS.model_copy(update=changes),
        make,
        collate,
        of,
        lambda values, step: points.append((step, values)),
        checkpoints or Checkpoints(folder),
        "toy",
        evaluate,
    )
    return points


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Interrupted(Exception):
    pass


def interrupted(at: int) -> Callable[[int], Any]:
    def make(index: int) -> Any:
        if index >= at:
            raise Interrupted
        return item(index)

    return make


@pytest.mark.parametrize(("accumulate", "muon"), [(1, 0.0), (3, 0.0), (1, 0.02)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, accumulate: int, muon: float
) -> None:
    """Weights, statistics and the whole logged curve, wherever and however often it was stopped."""
    straight = toy()
    curve = run(straight, tmp_path / "straight", accumulate=accumulate, muon=muon)
    resumed = toy()
    a_step = 4 * accumulate
    for stop in (9, 12, 23):  # before the second checkpoint, again before it, after the third
        with pytest.raises(Interrupted):
            run(resumed, tmp_path / "resumed", interrupted(stop * a_step), accumulate=accumulate, muon=muon)
        resumed = toy()  # a new process begins with new weights
        torch.manual_seed(stop)  # and other random numbers
    points = run(resumed, tmp_path / "resumed", accumulate=accumulate, muon=muon)
    assert equal(state(resumed), state(straight))
    assert points == curve
    assert not equal(state(straight), state(toy()))


def slowly(folder: Path, out: Path) -> None:
    """Train and save, in a process of its own."""

    def make(index: int) -> Any:
        time.sleep(0.005)
        return item(index)

    model = toy()
    run(model, folder, make, steps=40, checkpoint_every=5)
    save_file(model.state_dict(), out)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without what libraries of earlier tests do at an exit, as in tests/processes.py


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "model.safetensors", tmp_path / "checkpoints"
    first, second = (get_context("fork").Process(target=slowly, args=(folder, out)) for _ in "ab")
    first.start()
    while not (folder / "step-00000010").is_dir():
        assert first.is_alive(), "it ended before it could be killed"
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert not out.exists()
    second.start()
    second.join()
    assert second.exitcode == 0
    said = capfd.readouterr()
    assert re.search(r"toy: goes on from step (10|15|20|25|30|35)\b", said.out + said.err)
    straight = toy()
    run(straight, tmp_path / "straight", steps=40, checkpoint_every=5)
    assert equal(load_file(out), state(straight))


def test_accumulated_batches_equal_a_larger_one(tmp_path: Path) -> None:
    whole, parts = toy(0.0), toy(0.0)
    one = run(whole, tmp_path / "whole", images=8, accumulate=1)
    other = run(parts, tmp_path / "parts", images=2, accumulate=4)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(parts)[name], value, atol=1e-5, rtol=1e-4)
    for (step, figures), (again, same) in zip(one, other, strict=True):
        assert step == again
        assert same == pytest.approx(figures, rel=1e-3)  # the norm of the gradient too


def test_every_item_is_seen_once_and_in_order(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(model: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        seen.extend(batch.indices)
        return loss(model, batch)

    run(toy(), tmp_path, of=watch, steps=5, accumulate=2)
    assert seen == list(range(5 * 4 * 2))
    assert Items(10, 7, item)[2][0] == 9
    assert len(Items(10, 7, item)) == 3


def test_what_is_logged_and_when(tmp_path: Path) -> None:
    model, still = toy(0.0), toy(0.0)
    sometimes = {"calls": 0}

    def of(model: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        value, parts = loss(model, batch)
        sometimes["calls"] += 1
        if sometimes["calls"] % 5 == 0:  # as the rewards of a batch that has pairs
            parts["rewards_t/margins"] = torch.tensor(3.0)
        return value, parts

    evaluations: list[bool] = []

    def evaluate() -> dict[str, float]:
        evaluations.append(model.training)
        return {"val/iou": 0.5}

    points = run(model, tmp_path, of=of, evaluate=evaluate, lr=1e-12, warmup=0.0)
    assert [step for step, values in points if "train/loss" in values] == [10, 20, 25]
    assert [step for step, values in points if "val/iou" in values] == [9, 18, 25]
    assert evaluations == [False] * 3
    assert not model.training
    names = {"train/loss", "train/part", "train/grad_norm", "train/lr", "rewards_t/margins"}
    last = points[-2][1]
    assert set(last) == names
    batches = [collate([item(i) for i in range(4 * step, 4 * step + 4)]) for step in range(20, 25)]
    expected = [loss(still, batch)[0].item() for batch in batches]  # so small a rate changes nothing
    assert last["train/loss"] == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert last["train/part"] == pytest.approx(sum(expected) / 10, rel=1e-5)
    assert last["rewards_t/margins"] == 3.0  # the mean of where it was, not of all batches
    assert last["train/lr"] == pytest.approx(0.0, abs=1e-20)  # a cosine down to nothing
    rates = [values["train/lr"] for _, values in points if "train/lr" in values]
    assert rates == pytest.approx([1e-12 * (1 + math.cos(math.pi * s / 25)) / 2 for s in (10, 20, 25)])


def test_gradients_are_clipped_and_biases_do_not_decay(tmp_path: Path) -> None:
    def flat(model: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        value = sum((p.sum() for p in model.parameters()), torch.zeros(())) * 0.0
        return value, {}

    model = toy(0.0)
    before = state(model)
    run(model, tmp_path, of=flat, steps=1, warmup=0.0, lr=0.1, weight_decay=0.5)
    for name, value in state(model).items():
        kept = 1.0 - 0.1 * 0.5 if name.endswith("weight") else 1.0
        torch.testing.assert_close(value, before[name] * kept)

    steep = run(toy(0.0), tmp_path / "b", of=lambda m, b: (1e3 * loss(m, b)[0], {}), steps=1, clip=1e-9)
    assert steep[0][1]["train/grad_norm"] > 100  # as it was before clipping


@pytest.mark.parametrize("bad", ["loss", "gradient's norm"])
def test_a_step_that_is_not_finite_is_not_made(tmp_path: Path, bad: str) -> None:
    kept: list[dict[str, Tensor]] = []

    def poisoned(model: nn.Module, batch: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        kept.append(state(model))
        value, parts = loss(model, batch)
        if batch.indices[0] == 4 * 12:
            # infinity itself, or a finite value with an infinite slope
            value = value / 0 if bad == "loss" else value + (value - value.detach()).sqrt()
        return value, parts

    model = toy(0.0)
    message = rf"^the {bad} is (inf|nan) at step 12: \{{'part': .*lower the learning rate"
    with pytest.raises(DivergedError, match=message):
        run(model, tmp_path, of=poisoned)
    assert len(kept) == 13
    assert equal(state(model), kept[-1])
    assert Checkpoints(tmp_path).latest() == (7, tmp_path / "step-00000007")


class FullDisk(Checkpoints):
    """From the second checkpoint on, a file of it lies on a full disk: the kernel's /dev/full."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(folder)
        self.file, self.count = file, 0

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        def fill(folder: Path) -> None:
            self.count += 1
            if self.count > 1:
                (folder / self.file).symlink_to("/dev/full")
            write(folder)

        return super().save(step, fill)


@pytest.mark.parametrize("file", ["optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"])
def test_a_full_disk_stops_the_run_and_leaves_the_previous_checkpoint(tmp_path: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match="disk full while writing the checkpoint of step 14"):
        run(toy(), tmp_path / "full", checkpoints=FullDisk(tmp_path / "full", file))
    assert Checkpoints(tmp_path / "full").latest() == (7, tmp_path / "full" / "step-00000007")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["step-00000007"]
    resumed = toy()
    run(resumed, tmp_path / "full")
    straight = toy()
    run(straight, tmp_path / "straight")
    assert equal(state(resumed), state(straight))


@pytest.mark.parametrize(("asked", "able"), [(True, True), (True, False), (False, True)])
def test_bfloat16_where_it_is_asked_for_and_fast(
    asked: bool, able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes in bfloat16, weights and loss stay in float32; else nothing changes, bit for bit."""
    seen: list[torch.dtype] = []

    def watched() -> nn.Module:
        model = toy(0.0)
        model.register_forward_hook(lambda module, given, answer: seen.append(answer.dtype))
        return model

    plain = run(watched(), tmp_path / "a")
    seen.clear()
    monkeypatch.setattr(devices, "halves", lambda: able)
    model = watched()
    points = run(model, tmp_path / "b", bf16=asked)
    halved = asked and able
    assert set(seen) == {torch.bfloat16 if halved else torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert (points == plain) is not halved
    assert points[-1][1]["train/loss"] == pytest.approx(plain[-1][1]["train/loss"], rel=0.05)


def test_attention_in_bfloat16_takes_the_kernel_whose_backward_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "halves", lambda: True)
    kernels: list[str] = []

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.net(x).view(1, 1, -1, 8)
            out = nn.functional.scaled_dot_product_attention(q, q, q)
            assert out.grad_fn is not None
            kernels.append(out.grad_fn.name())
            return out[0, 0, :, :1]

    run(Attending(), tmp_path, steps=1, bf16=True)
    assert kernels
    assert not any("Flash" in name for name in kernels)
