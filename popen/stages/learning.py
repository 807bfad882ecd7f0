"""What the training stages share: their inputs, their batches, and what surrounds the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from popen.checkpoints import Checkpoints, digest, fingerprint
from popen.data import refcoco
from popen.data.images import open_image
from popen.data.plan import Plan
from popen.masks import decode
from popen.model.batches import Batch, Row
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.optim import Slow
from popen.params import SftWeights, TrainParams
from popen.parts import Parts
from popen.preference.records import TextPair
from popen.samples import Sample, read_index
from popen.stages.run import Run
from popen.training import Loss, train

Pair = TypeVar("Pair", Sample, TextPair)
T = TypeVar("T")

INDEX = Path("artifacts/index")
MODELS = Path("artifacts/models")
PREFERENCES = Path("artifacts/preferences")
TEXT_PAIRS = PREFERENCES / "text.jsonl"


def samples(role: str) -> list[Sample]:
    """The validated samples of a role."""
    return list(read_index(INDEX / f"{role}.jsonl"))


def sample_row(sample: Sample, image: int) -> Row:
    """A sample as a supervised row: its own answer and masks."""
    masks = [decode(target.rle) for target in sample.targets]
    ignore = None if sample.ignore is None else decode(sample.ignore)
    return Row(image, sample.question, sample.answer, masks, ignore)


def image_plan(samples: Sequence[Sample], questions: int, seed: int) -> Plan[Sample]:
    """Items are images with up to `questions` of their questions."""
    return Plan(samples, questions, seed, key=lambda sample: sample.image)


def sft_collate(model: Segmenter, run: Run, auxiliary: bool) -> Callable[[Sequence[list[Sample]]], Batch]:
    """Items (the samples of one image each) -> a supervised batch.

    `sft.masks` samples of an item supervise masks too: one that refers to a thing where there is one, for
    its words teach nothing without the mask, and the first of the others. `auxiliary` adds what the
    auxiliary losses compare with.
    """
    data, masks = run.params.data, run.params.sft.masks

    def collate(items: Sequence[list[Sample]]) -> Batch:
        images = [open_image(Path(data.root), item[0].image, data.max_pixels) for item in items]
        rows = []
        for image, item in enumerate(items):
            first = next((n for n, sample in enumerate(item) if sample.benchmark in refcoco.SPLITS), 0)
            for place, sample in enumerate([item[first], *item[:first], *item[first + 1 :]]):
                row = sample_row(sample, image)
                kinds = [target.category for target in sample.targets] if auxiliary else None
                rows.append(replace(row, masks=row.masks if place < masks else None, kinds=kinds))
        return model.encoder.batch(images, rows, [item[0] for item in items] if auxiliary else ())

    return collate


def validation(
    model: Segmenter, run: Run, held_out: Sequence[Sample], weights: SftWeights
) -> Callable[[], dict[str, float]]:
    """Loss and IoU on held-out questions with the true answers fed (teacher-forced, and called so)."""
    plan = image_plan(held_out, run.params.sft.masks, run.params.seed)
    collate = sft_collate(model, run, auxiliary=False)
    count = min(len(plan.groups), 192)
    batches = [collate([plan.item(i) for i in range(at, min(at + 32, count))]) for at in range(0, count, 32)]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        ce, ious = list[Tensor](), list[Tensor]()
        for batch in batches:
            batch = batch.to(model.device)
            output = model(batch)
            ce.append(sft_loss(output, batch, weights)[1]["ce"])
            predicted, true = (output.masks > 0) & (batch.valid > 0), (batch.masks > 0) & (batch.valid > 0)
            joint = (predicted | true).flatten(1).sum(1)
            ious.append((predicted & true).flatten(1).sum(1) / joint.clamp(min=1) + (joint == 0).float())
        means = float(torch.stack(ce).mean()), float(torch.cat(ious).mean())
        return dict(zip(("val/ce_teacher_forced", "val/iou_teacher_forced"), means, strict=True))

    return evaluate


def pair_plan(pairs: Sequence[Pair], seed: int) -> Callable[[int], Pair]:
    """Item number -> a question; each comes once an epoch, in an order of the seed's."""
    plan = Plan(pairs, 1, seed, key=lambda pair: pair.uid)
    return lambda index: plan.item(index)[0]


def both_stages(params: TrainParams) -> TrainParams:
    """The steps of the curriculum's two stages in one run: what the controls get."""
    return params.model_copy(update={"steps": 2 * params.steps})


def fit(
    run: Run,
    model: nn.Module,
    params: TrainParams,
    item: Callable[[int], Any],
    collate: Callable[[Sequence[Any]], Any],
    loss: Loss,
    evaluate: Callable[[], dict[str, float]] | None,
    inputs: Iterable[Path],
    settings: Iterable[object],
    save: Callable[[], None],
    slow: Slow | None = None,
) -> None:
    """Train with checkpoints keyed by all that shapes the result, log the curves, save the result.

    `inputs` are files or folders, `settings` the further parameter groups that the stage depends on. The
    checkpoints are removed only when `save` has written the result: a full disk then costs no training.
    """
    checkpoints = Checkpoints(_kept_in(run, [params, *settings], inputs))
    train(model, params, item, collate, loss, run.log_metrics, checkpoints, run.name, evaluate, slow)
    run.curves(Path("artifacts/curves") / f"{run.name.replace('@', '_')}.csv")
    if run.main:
        save()
        checkpoints.clear()


def kept_parts(
    run: Run,
    inputs: Iterable[Path],
    settings: Iterable[object],
    write: Callable[[Path, list[T]], object],
    read: Callable[[Path], Iterable[T]],
    cores: int = 1,
) -> Parts[T]:
    """Where a stage keeps the batches that are done; `inputs` and `settings` as for `fit`."""
    return Parts(_kept_in(run, settings, inputs), write, read, cores)


def _kept_in(run: Run, settings: Iterable[object], inputs: Iterable[Path]) -> Path:
    key = fingerprint(run.name, run.params.seed, *settings, [digest(path) for path in inputs])
    return run.home / ".checkpoints" / f"{run.name}-{key}"
