"""What the training stages share: their batches, and what surrounds the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from popen.data import refcoco
from popen.data.images import open_image
from popen.data.plan import Plan
from popen.masks import decode
from popen.model import IGNORED
from popen.model.batches import Batch, Row
from popen.model.losses import token_logps
from popen.model.segmenter import Segmenter
from popen.optim import Slow
from popen.params import TrainParams
from popen.samples import Sample
from popen.stages.artifacts import CURVES
from popen.stages.kept import kept_steps
from popen.stages.run import Run

if TYPE_CHECKING:
    from popen.preference.records import TextPair
    from popen.training import Loss

Pair = TypeVar("Pair", Sample, "TextPair")

HELD_OUT = 48  # images of a kind of benchmark that validation looks at


def sample_row(sample: Sample, image: int) -> Row:
    """A sample as a supervised row: its own answer and masks."""
    masks = [decode(target.rle) for target in sample.targets]
    ignore = None if sample.ignore is None else decode(sample.ignore)
    return Row(image, sample.question, sample.answer, masks, ignore)


def image_plan(samples: Sequence[Sample], questions: int, seed: int) -> Plan[Sample]:
    """Items are images with up to `questions` of their questions."""
    return Plan(samples, questions, seed, key=lambda sample: sample.image)


def sft_collate(
    model: Segmenter, run: Run, drawn: int, auxiliary: bool
) -> Callable[[Sequence[list[Sample]]], Batch]:
    """Items (the samples of one image each) -> a supervised batch.

    Of `drawn` samples of an item the masks are drawn: one that refers to a thing where there is one, for its
    words teach little without the mask, and the first of the others. `auxiliary` adds what the auxiliary
    losses compare with; some of those learn from all samples' masks.
    """
    data = run.params.data

    def collate(items: Sequence[list[Sample]]) -> Batch:
        images = [open_image(Path(data.root), item[0].image, data.max_pixels) for item in items]
        rows = []
        for image, item in enumerate(items):
            first = next((n for n, sample in enumerate(item) if sample.benchmark in refcoco.SPLITS), 0)
            for place, sample in enumerate([item[first], *item[:first], *item[first + 1 :]]):
                kinds = [target.category for target in sample.targets] if auxiliary else None
                rows.append(replace(sample_row(sample, image), kinds=kinds, drawn=place < drawn))
        return model.encoder.batch(images, rows, [item[0] for item in items] if auxiliary else ())

    return collate


def validation(model: Segmenter, run: Run, held_out: Sequence[Sample]) -> Callable[[], dict[str, float]]:
    """Cross-entropy and IoU on held-out questions of each kind of benchmark with the true answers fed
    (teacher-forced), so that the words of captions do not hide those of reasoning questions."""
    questions = run.params.sft.questions
    collate = sft_collate(model, run, questions, auxiliary=False)
    kinds = sorted({_kind(sample) for sample in held_out})
    batches = dict[str, list[Batch]]()
    for kind in kinds:
        plan = image_plan([s for s in held_out if _kind(s) == kind], questions, run.params.seed)
        items = [plan.item(number) for number in range(min(len(plan.groups), HELD_OUT))]
        size = run.params.sft.train.images  # what fits in training fits here
        batches[kind] = [collate(items[at : at + size]) for at in range(0, len(items), size)]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        found = dict[str, float]()
        for kind, parts in batches.items():
            ce, ious = list[Tensor](), list[Tensor]()
            for batch in (part.to(model.device) for part in parts):
                output = model(batch)
                ce.append(-token_logps(output.logits, batch)[batch.labels != IGNORED])
                predicted, true = (mask & (batch.valid > 0) for mask in (output.masks > 0, batch.masks > 0))
                joint = (predicted | true).flatten(1).sum(1)
                ious.append((predicted & true).flatten(1).sum(1) / joint.clamp(min=1) + (joint == 0).float())
            found[f"val_teacher_forced/ce_{kind}"] = float(torch.cat(ce).mean())
            if sum(map(len, ious)):
                found[f"val_teacher_forced/iou_{kind}"] = float(torch.cat(ious).mean())
        return found

    return evaluate


def _kind(sample: Sample) -> str:
    return "refcoco" if sample.benchmark in refcoco.SPLITS else sample.benchmark


def pair_plan(pairs: Sequence[Pair], seed: int, start: int = 0) -> Callable[[int], Pair]:
    """Item number -> a question; each comes once an epoch, in an order of the seed's. The first `start` are
    passed over: a stage before saw them."""
    plan = Plan(pairs, 1, seed, key=lambda pair: pair.uid)
    return lambda index: plan.item(start + index)[0]


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
    from popen.training import train  # with what shards models: seconds that `evaluate` need not wait

    checkpoints = kept_steps(run, inputs, [params, *settings])
    train(model, params, item, collate, loss, run.log_metrics, checkpoints, run.name, evaluate, slow)
    run.curves(CURVES / f"{run.name.replace('@', '_')}.csv")
    if run.main:
        save()
        checkpoints.clear()
