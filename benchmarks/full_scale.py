"""Speed and memory of training, generation and the ensemble, at LLaVA-1.5-7B's size or the default's.

    python -m benchmarks.full_scale --scale llava-7b --out full_scale.jsonl

Weights are random, sizes and code are the real ones: training steps run through `popen.training.train` (its
loader, clipping and optimiser included), answers through `popen.model.generate` and `popen.ensemble.members`.
Every figure is written as soon as it is known; one that fails is reported and the rest go on. benchmarks/
flops.py says what counts as a FLOP. Tokens are those that the language model reads, an image's once for all
rows about it; in generation and the ensemble, those it writes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# before torch starts the device: blocks that can grow leave no gaps between batches of different length
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks.flops import Flops
from benchmarks.measuring import Measuring, Record, table
from benchmarks.setting import PIXELLM, Scale, Work, build, default_scale, draw, llava_7b, rows_of
from popen.checkpoints import Checkpoints
from popen.ensemble.attention import RefinementAttention
from popen.ensemble.members import Ensemble
from popen.ensemble.score import FEATURES, Score
from popen.model.batches import Batch
from popen.model.generate import Answer, generate
from popen.model.losses import sft_loss, token_logps
from popen.model.segmenter import Segmenter
from popen.params import AlignParams, EnsembleParams, TrainParams, load
from popen.preference.alignment import PreferenceBatch, align_loss, collate
from popen.training import Loss, train

PARTS = ("sft", "align", "generate", "ensemble", "compiled")
WARM = 2  # first steps, not counted


class Bench(Measuring):
    """One model, and its measurements."""

    def __init__(self, scale: Scale, device: torch.device, root: Path, out: Path, seconds: float) -> None:
        super().__init__(device, out)
        self.scale, self.root = scale, root
        start = time.monotonic()
        if self.measure("build", self._build) is None:
            raise RuntimeError("the model could not be built; the error is above")
        self.end = start + seconds

    def _build(self) -> Record:
        start = time.perf_counter()
        self.model: Segmenter = build(self.scale, self.device)
        self.flops = Flops.of(self.model)
        self.prefix = len(self.model.encoder.prefix_ids)
        count = max(*self.scale.images, self.scale.answers, self.scale.asked, self.scale.alone)
        self.work: Work = draw(self.model, self.root, count)
        parameters = list(self.model.parameters())
        return {
            "seconds": time.perf_counter() - start,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }

    # -- training

    def steps(self, images: int, loss: Loss, preference: bool) -> Record:
        """Median step of `popen.training.train` on `images` images with two answers each; a batch is an
        alignment's, of which SFT takes the rows."""
        starts: list[float] = []
        loading: list[float] = []
        shapes: list[Batch] = []
        pairs = collate(self.model, self.work.root, 10**8, self.work.masks)

        def make(items: Sequence[Any]) -> Any:
            start = time.perf_counter()
            made = pairs(items)
            loading.append(time.perf_counter() - start)
            return made if preference else made.batch

        def timed(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            starts.append(self.sync())
            shapes.append(batch.batch if preference else batch)
            return loss(model, batch)

        count = WARM + self.scale.steps
        params = TrainParams(
            steps=count,
            images=images,
            accumulate=1,
            lr=1e-5,
            muon=0.0,
            warmup=0.1,
            weight_decay=0.0,
            clip=1.0,
            bf16=True,
            checkpoint_every=count + 1,
            eval_every=count + 1,
        )
        self.model.zero_grad(set_to_none=True)  # those of a step that did not fit
        train(
            self.model,
            params,
            lambda index: self.work.pairs[index % len(self.work.pairs)],
            make,
            timed,
            lambda values, step: None,
            Checkpoints(self.root / "checkpoints"),
            f"{images} images",
        )
        starts.append(self.sync())
        took = [end - start for start, end in itertools.pairwise(starts)][WARM:]
        batch = shapes[-1]
        rests = int(batch.attention_mask[:, self.prefix :].sum())
        return {
            "images": images,
            "rows": len(batch.input_ids),
            "loading_s": statistics.median(loading[WARM:]),
            "all_s": took,
            **self.speed(
                statistics.median(took),
                images,
                images * self.prefix + rests,
                self.flops.step(batch, self.prefix),
            ),
        }

    def sft(self, name: str = "sft") -> int:
        """The largest step that fits; its number of images, 0 where none does."""

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return sft_loss(model(batch), batch, PIXELLM)

        for images in self.scale.images:
            if self.measure(f"{name} ({images} images)", partial(self.steps, images, loss, False)):
                return images
        return 0

    def align(self, params: AlignParams) -> None:
        """L_pre, against an SFT step on the same rows, and against a reference that is run along."""
        loss = align_loss(params, PIXELLM)

        def same_rows(model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
            return sft_loss(model(batch.batch), batch.batch, PIXELLM)

        def reference_along(model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, dict]:
            # the same model's weights stand for the reference's: the time is the same, 13 GB of memory less
            with torch.no_grad():
                logps = token_logps(model(batch.batch).logits, batch.batch)
            return loss(model, replace(batch, reference=logps))

        for images in self.scale.images:
            aligned = self.measure(
                f"align, values stored ({images} images)", partial(self.steps, images, loss, True)
            )
            if aligned is None:
                continue
            for name, other in (("sft, same rows", same_rows), ("align, reference along", reference_along)):
                rival = self.measure(f"{name} ({images} images)", partial(self.steps, images, other, True))
                if rival is not None:
                    share = aligned["seconds"] / rival["seconds"]
                    self.measure(f"align / {name}", partial(dict, ratio=share))
            return

    def compiled(self) -> None:
        """SFT with the blocks' norms and MLPs compiled: what fusing the elementwise work would give."""
        for layer in self.model.causal.base_model.layers:
            for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                part.compile()
        self.sft("sft, compiled")

    # -- answering

    @contextmanager
    def answering(self) -> Iterator[None]:
        """bf16 where training has it; nothing to differentiate."""
        self.model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            yield

    def answers(self, ask: Callable[[], list[Answer]], repeats: int, images: int, passes: int) -> Record:
        """Median of `repeats` calls after a first; `images` prefixes are read, all answers `passes` times
        as many."""
        took: list[float] = []
        with self.answering():
            for _ in range(1 + repeats):
                start = self.sync()
                said = ask()
                took.append(self.sync() - start)
        took = took[1:] or took
        words = sum(len(answer.token_ids) for answer in said)
        asked = self.work.questions
        behind = [
            len(self.model.encoder.question_ids(asked[at % len(said)])) + len(answer.token_ids)
            for at, answer in enumerate(said)
        ] * passes
        flops = self.flops.forward(images, self.prefix, behind, words * passes)
        return {
            "answers": len(said),
            "targets": sum(len(answer.masks) for answer in said),
            "all_s": took,
            **self.speed(statistics.median(took), len(said), words, flops),
        }

    def generate(self) -> None:
        """Answers in one batch, and one by one."""
        images, pairs, words = self.work.images, self.work.pairs, self.scale.words
        many, few = self.scale.answers, self.scale.alone

        def batched() -> list[Answer]:
            return generate(self.model, images[:many], rows_of(pairs[:many]), words)

        def alone() -> list[Answer]:
            found: list[Answer] = []
            for image, pair in zip(images[:few], pairs, strict=False):
                found += generate(self.model, [image], rows_of([pair]), words)
            return found

        one = self.measure(f"generate, {many} at once", partial(self.answers, batched, 3, many, 1))
        other = self.measure(f"generate, {few} one by one", partial(self.answers, alone, 0, few, 1))
        if one and other:
            ratio = one["samples_per_s"] / other["samples_per_s"]
            self.measure("generate: batched / one by one, answers a second", partial(dict, ratio=ratio))

    def ensemble(self, params: EnsembleParams) -> None:
        """M members: written in one pass, read again with every member's image, refined."""
        asked = self.scale.asked
        images, questions = self.work.images[:asked], self.work.questions[:asked]
        attention = RefinementAttention(self.model.codebook.scales, self.model.params.decoder.width)
        score = Score(FEATURES, (0.0,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0))

        def answer(members: int) -> list[Answer]:
            system = Ensemble(self.model, None, score, attention.to(self.device), params, 0.0)
            return system.answer(images, questions, members, self.scale.words, 0)

        first: Record | None = None
        for members in (1, 4, 8):
            name = f"ensemble of {members}"
            this = self.measure(
                f"{name} ({asked} questions)",
                partial(self.answers, partial(answer, members), 2, 2 * members * asked, 2 * members),
            )
            first = first or this
            if first and this and members > 1:
                ratio = this["seconds"] / first["seconds"]
                self.measure(f"{name} / ensemble of 1", partial(dict, ratio=ratio))


def run(
    scale: Scale, device: torch.device, only: Sequence[str], seconds: float, out: Path, root: Path
) -> list[Record]:
    """Measure the parts named in `only`; the records, as written to `out`."""
    params = load()
    bench = Bench(scale, device, root, out, seconds)
    work: dict[str, Callable[[], object]] = {
        "sft": bench.sft,
        "align": lambda: bench.align(params.align),
        "generate": bench.generate,
        "ensemble": lambda: bench.ensemble(params.ensemble),
        "compiled": bench.compiled,
    }
    for name in PARTS:
        if name in only:
            work[name]()
    return bench.records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", choices=("llava-7b", "default"), default="default")
    parser.add_argument(
        "--only", default=",".join(PARTS[:-1]), help=f"comma-separated, of {', '.join(PARTS)}"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="start no measurement after so long")
    parser.add_argument("--out", type=Path, default=Path("full_scale.jsonl"))
    options = parser.parse_args()
    only = options.only.split(",")
    if not set(only) <= set(PARTS):
        parser.error(f"--only takes some of {', '.join(PARTS)}, not {options.only}")
    if options.scale == "llava-7b" and not torch.cuda.is_available():
        sys.exit("llava-7b needs a GPU of 80 GB, and torch sees none; --scale default runs on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scale = llava_7b(root / "config") if options.scale == "llava-7b" else default_scale()
        print(table(run(scale, device, only, options.seconds, options.out, root)))


if __name__ == "__main__":
    main()
