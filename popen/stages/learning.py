"""What the training stages share: their inputs, their batches, and what surrounds the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml
from torch import Tensor, nn

from popen.alone import alone
from popen.checkpoints import Checkpoints, digest, fingerprint
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
from popen.parts import Parts
from popen.preference.records import TextPair
from popen.samples import Sample, read_index
from popen.stages.run import Run

if TYPE_CHECKING:
    from popen.training import Loss

Pair = TypeVar("Pair", Sample, TextPair)
T = TypeVar("T")

INDEX = Path("artifacts/index")
MODELS = Path("artifacts/models")
PREFERENCES = Path("artifacts/preferences")
TEXT_PAIRS = PREFERENCES / "text.jsonl"
HELD_OUT = 48  # images of a kind of benchmark that validation looks at


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
    questions = run.params.sft.train.questions
    collate = sft_collate(model, run, questions, auxiliary=False)
    kinds = sorted({_kind(sample) for sample in held_out})
    batches = dict[str, list[Batch]]()
    for kind in kinds:
        plan = image_plan([s for s in held_out if _kind(s) == kind], questions, run.params.seed)
        items = [plan.item(number) for number in range(min(len(plan.groups), HELD_OUT))]
        batches[kind] = [collate(items[at : at + 24]) for at in range(0, len(items), 24)]

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
    from popen.training import train  # with what shards models: seconds that `evaluate` need not wait

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
    """The folder of a piece of work, once no other stage is at it."""
    work = fingerprint(run.name, run.params.seed, *settings, [digest(path) for path in inputs])
    folder = run.home / ".checkpoints" / f"{run.name}-{fingerprint(work, _code(run.name.partition('@')[0]))}"
    busy = "another process is at the same work; waiting for its end"
    return alone(run.home, work, folder, lambda: run.say(busy))


def _code(stage: str) -> list[list[str]]:
    """The state of the code that dvc.yaml names for a stage: nothing goes on from what another one left, and
    an edit elsewhere costs no training."""
    project = Path(__file__).parents[2]
    entry = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    named = [project / dep for dep in entry.get("do", entry)["deps"] if dep.startswith("popen/")]
    # of folders no compiled files, which change with every import
    files = sorted(file for path in named for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return [[file.relative_to(project).as_posix(), digest(file)] for file in files]
