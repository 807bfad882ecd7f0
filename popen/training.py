"""The one training loop, on `accelerate`: accumulation, clipping, checkpoints, a stop before a bad step.

Several processes (`popen.devices`) share each micro-batch and make the steps that one process would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from popen import devices, sharding
from popen.optim import Slow, deal, optimizers
from popen.params import TrainParams

Log = Callable[[dict[str, float], int], None]
Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Any]]]  # parts: tensors () or numbers


# how long processes wait for the main one, which may be writing a checkpoint of 26 GB to a slow disk
PATIENCE = timedelta(hours=2)


class DivergedError(RuntimeError):
    """The loss stopped being a finite number."""


class Curve:
    """What is logged: means over the micro-batches since the last point of a name.

    It is a part of every checkpoint, and a run that goes on logs its past again: its curve is whole.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.points: list[tuple[int, dict[str, float]]] = []
        self.sums: dict[str, tuple[float, int]] = {}  # name -> sum and count: not every batch has every name

    def add(self, parts: dict[str, Tensor | float]) -> None:
        """The figures of one micro-batch."""
        for name, value in parts.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + float(value), count + 1

    def means(self) -> dict[str, float]:
        """The means so far; the next ones start anew."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def point(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, values))
        self.log(values, step)

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.sums = state["points"], state["sums"]
        for step, values in self.points:
            self.log(values, step)


class _Objective(nn.Module):
    """A model and its loss as one module: what DDP wraps. It must see which parameters the loss reaches,
    for a process without a target reaches fewer than the others. A sharded model must reach all."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        value, parts = self.loss(self.model, batch)
        return (value + sharding.reached(self.model) if devices.sharded() else value), parts


class Items(Dataset[Any]):
    """Item i of the run is a function of i alone: a resumed run sees what an uninterrupted one would."""

    def __init__(self, count: int, start: int, make: Callable[[int], Any]) -> None:
        self.count, self.start, self.make = count, start, make

    def __len__(self) -> int:
        return self.count - self.start

    def __getitem__(self, index: int) -> Any:
        return self.make(self.start + index)


def train(
    model: nn.Module,
    params: TrainParams,
    item: Callable[[int], Any],
    collate: Callable[[Sequence[Any]], Any],
    loss: Loss,
    log: Log,
    checkpoints: Any,
    name: str,
    evaluate: Callable[[], dict[str, float]] | None = None,
    slow: Slow | None = None,
) -> None:
    """Train `model` in place for `params.steps` optimiser steps.

    Args:
        item: number -> one item (an image with its questions, a pair); a pure function of the number.
        collate: `params.images` items, or one of several processes' part of them -> what `loss` takes.
        loss: the model and a batch -> scalar and its parts. Its means are multiplied by `devices.share`,
            or several processes would weigh their parts of a batch alike, whatever is in them.
        checkpoints: a `popen.checkpoints.Checkpoints`; training goes on from the last complete one.
        slow: see `popen.optim.optimizers`.
        evaluate: called every `params.eval_every` steps and at the end; what it returns is logged.

    Every process calls this with the same arguments; all but the main one log and write nothing.

    Raises DivergedError before the optimiser step when the loss or its gradient is not finite, and
    DevicesError for what several processes cannot share.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    from transformers import get_cosine_schedule_with_warmup

    model.train()
    _stop_unless_shareable(model, params)
    accelerator = Accelerator(
        gradient_accumulation_steps=params.accumulate,
        cpu=not torch.cuda.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    halves = params.bf16 and devices.halves()
    if halves:
        model.forward = _in_halves(model.forward)
    if devices.sharded():
        sharding.shard(model)  # layer by layer onto the device: all of it might not fit there
    trainable = [p for p in model.parameters() if p.requires_grad]
    chosen = optimizers(model, params, slow)
    warmup = math.ceil(params.warmup * params.steps)
    schedules = [get_cosine_schedule_with_warmup(one, warmup, params.steps) for one in chosen]
    curve = Curve(log)
    accelerator.register_for_checkpointing(*schedules, curve)
    for optimizer in chosen:
        if isinstance(optimizer, torch.optim.Muon) and devices.grouped():
            deal(optimizer)
    _keep_plain(accelerator, model, chosen)
    objective = _Objective(model, loss)
    prepared = accelerator.prepare_model(objective, evaluation_mode=devices.sharded())  # that is, without DDP
    chosen = [accelerator.prepare(one) for one in chosen]
    found: tuple[int, Path] | None = checkpoints.latest()
    done = 0
    if found is not None:
        done, folder = found
        accelerator.load_state(str(folder))
        _say(f"{name}: goes on from step {done}")
    a_step = params.images * params.accumulate
    loader = DataLoader(
        Items(params.steps * a_step, done * a_step, item),
        batch_size=params.images,
        collate_fn=lambda items: collate(items).to(accelerator.device),
        generator=torch.Generator(),  # its own: drawing from the global one would shift a resumed run's draws
    )
    loader = accelerator.prepare(loader)
    step = done
    with tqdm(
        total=params.steps,
        initial=done,
        desc=name,
        unit="step",
        mininterval=2.0,
        dynamic_ncols=True,
        disable=not devices.is_main(),
    ) as bar:
        for batch in loader:
            with accelerator.accumulate(prepared):
                value, parts = prepared(batch)
                parts = devices.means({"loss": value.detach(), **parts})
                total = parts.pop("loss")
                _stop_unless_finite(total, "loss", parts, step)
                with _plain_attention() if halves else nullcontext():  # checkpointing runs forward again
                    accelerator.backward(value)
                if accelerator.sync_gradients:
                    if devices.sharded():
                        sharding.reduce_scalars(model)
                    parts["grad_norm"] = sharding.plain(accelerator.clip_grad_norm_(trainable, params.clip))
                    _stop_unless_finite(parts["grad_norm"], "gradient's norm", parts, step)
                for optimizer in chosen:
                    optimizer.step()
                    optimizer.zero_grad()
            curve.add({"loss": total, **parts})
            if not accelerator.sync_gradients:
                continue
            for schedule in schedules:
                schedule.step()
            step += 1
            bar.update()
            if step % 10 == 0 or step == params.steps:
                means = curve.means() | {"lr": schedules[0].get_last_lr()[0]}
                bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
                # names with a group of their own, "rewards_t/margins", keep it
                curve.point({k if "/" in k else f"train/{k}": mean for k, mean in means.items()}, step)
            if evaluate is not None and (step % params.eval_every == 0 or step == params.steps):
                prepared.eval()
                figures = evaluate()
                curve.point(figures, step)
                _say(
                    f"{name} step {step}: "
                    + "  ".join(f"{k.rpartition('/')[2]} {v:.3f}" for k, v in figures.items())
                )
                prepared.train()
            if step % params.checkpoint_every == 0 and step < params.steps:
                _save(checkpoints, step, lambda folder: accelerator.save_state(str(folder)))
    if devices.sharded():
        sharding.gather(model)
    model.eval()


def _in_halves(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward, and with it the backward, in bfloat16; the loss keeps its float32."""

    @wraps(forward)
    def halved(*args: Any, **kwargs: Any) -> Any:
        with devices.autocast(True), _plain_attention():
            return forward(*args, **kwargs)

    return halved


def _plain_attention() -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward is six times slower in bfloat16 than in float32."""
    return sdpa_kernel(SDPBackend.MATH) if devices.device().type == "cpu" else nullcontext()


def _keep_plain(accelerator: Any, model: nn.Module, chosen: Sequence[torch.optim.Optimizer]) -> None:
    """Checkpoints hold the plain model and moments: any number of processes can go on from them."""

    def save(_: list[nn.Module], states: list[dict[str, Tensor]], __: str) -> None:
        states[0] = sharding.weights(model) if devices.sharded() else model.state_dict()

    def load(models: list[nn.Module], folder: str) -> None:
        if devices.sharded():
            sharding.load_weights(model, Path(folder, "model.safetensors"))
            models.clear()
        else:
            models[0] = model

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    for optimizer in chosen if devices.sharded() else ():
        sharding.plain_moments(optimizer)


def _say(text: str) -> None:
    if devices.is_main():
        tqdm.write(text)


def _save(checkpoints: Any, step: int, write: Callable[[Path], None]) -> None:
    """Save a checkpoint that all processes write into; the main one begins and completes it."""

    def together(folder: Path) -> None:
        devices.wait()
        write(folder)
        devices.wait()

    if devices.is_main():
        checkpoints.save(step, together)
    else:
        together(checkpoints.draft(step))


def _stop_unless_shareable(model: nn.Module, params: TrainParams) -> None:
    count = devices.count()
    if count == 1:
        return
    if params.images % count:
        raise devices.DevicesError(
            f"{params.images} images a step cannot be shared by {count} devices; make `images` a "
            "multiple of their number"
        )
    if params.muon and devices.sharded():
        raise devices.DevicesError(
            f"Muon needs whole matrices, and {devices.SHARD}=1 spreads them over the devices; set "
            "`muon` to 0 or leave them whole"
        )
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise devices.DevicesError("batch norm would see another batch on each device; use one device")


def _stop_unless_finite(
    value: Tensor | float, what: str, parts: dict[str, Tensor | float], step: int
) -> None:
    if not math.isfinite(value):
        figures = {key: round(float(part), 4) for key, part in parts.items()}
        raise DivergedError(
            f"the {what} is {float(value)} at step {step}: {figures}; lower the learning rate or "
            "look at the data of this step"
        )
