"""Stage `calibrate`: mask thresholds and preference score from validation alone, the attention from the
preference split.

artifacts/thresholds.json         logit threshold of each system
artifacts/models/popen+ensemble   the calibrated ensemble, a bundle (see popen.predict)
metrics/ensemble.json             members against quality and seconds, and the modes compared
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from popen.stages.artifacts import BUNDLE, CURVES, MODELS, THRESHOLDS, index, samples
from popen.stages.run import Run, stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from popen.ensemble.attention import RefinementAttention
    from popen.ensemble.members import Aligned, Ensemble
    from popen.ensemble.score import Score
    from popen.evaluation.answering import Timed
    from popen.evaluation.prediction import Prediction
    from popen.model.batches import Batch
    from popen.model.segmenter import Segmenter
    from popen.parts import Parts
    from popen.samples import Sample

T = TypeVar("T")

SIZES = (1, 2, 4, 8)  # ensemble sizes of the report's figure
MODES = ("attention", "mean", "best", "probability")
ATTENTION_BATCHES, ATTENTION_BATCH = 20, 16  # and questions in each


class Shared:
    """Batches of answers that the machine's cores share; a stage that was killed goes on behind the last."""

    def __init__(self, run: Run, cores: int) -> None:
        self._run, self._cores = run, cores
        self._done: list[Parts[Any]] = []

    def __call__(
        self,
        name: str,
        inputs: Sequence[Path],
        settings: Sequence[object],
        numbers: range,
        make: Callable[[int], Iterable[T]],
    ) -> list[T]:
        """What `make` returns for each of `numbers`. `inputs` and `settings` decide it (see `kept_parts`)."""
        from popen import devices
        from popen.parts import in_batches
        from popen.stages.kept import kept_parts

        evaluate = self._run.params.evaluate
        settings = [name, *settings, evaluate.max_new_tokens, evaluate.bf16]
        parts: Parts[T] = kept_parts(self._run, inputs, settings, _write, _read, self._cores)
        self._done.append(parts)
        with devices.autocast(evaluate.bf16):
            return list(in_batches(numbers, make, f"calibrate {name}", parts))

    def clear(self) -> None:
        """Remove what is kept: the stage has written its results."""
        for parts in self._done:
            parts.clear()


def _write(path: Path, records: list[T]) -> None:
    import torch

    torch.save(records, path)  # not pickle: the answers' masks are parts of one tensor, kept once


def _read(path: Path) -> list[Any]:
    import torch

    found: list[Any] = torch.load(path, weights_only=False)
    return found


def _images(run: Run, asked: Sequence[Sample]) -> list[Image]:
    from popen.data.images import open_image

    return [open_image(Path(run.params.data.root), s.image, run.params.data.max_pixels) for s in asked]


def spread(asked: Sequence[T], count: int) -> list[T]:
    """`count` of them at even distances, in their order; all where there are no more.

    Masks are too large or too small by the kind of question: a threshold for all benchmarks is not to be
    found on the one that is listed first.
    """
    count = min(count, len(asked))
    return [asked[number * len(asked) // count] for number in range(count)]


def best_threshold(found: Sequence[Timed], levels: Sequence[float]) -> tuple[float, float]:
    """The threshold with the highest gIoU (union of an answer's masks) and that gIoU."""
    from popen.evaluation.answering import prediction
    from popen.evaluation.benchmark import METRICS, rows

    asked = [sample for sample, _, _ in found]
    scored = []
    for level in levels:
        table = rows(asked, [prediction(sample, answer, level, seconds) for sample, answer, seconds in found])
        scored.append((METRICS["gIoU"](table), -abs(level), level))
    best = max(scored)
    return best[2], best[0]


def member_figures(
    model: Segmenter, run: Run, asked: Sequence[Sample], threshold: float, start: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Of each question of the batch that begins at `start`: the members' features (M, F) and their answers'
    matched IoU (M,)."""
    import numpy as np

    from popen.ensemble.members import ask
    from popen.evaluation.answering import prediction
    from popen.evaluation.benchmark import rows

    params, part = run.params, asked[start : start + run.params.evaluate.batch]
    said = ask(
        model,
        None,
        _images(run, part),
        [sample.question for sample in part],
        params.ensemble,
        params.ensemble.members,
        params.evaluate.max_new_tokens,
        threshold,
        params.seed + start,
    )
    predictions = [
        [prediction(s, a, threshold, 0.0) for s, a in zip(part, answers, strict=True)]
        for answers in said.answers
    ]
    quality = np.stack([rows(part, member)["matched"].to_numpy(float) for member in predictions], axis=1)
    return list(zip(said.features, quality, strict=True))


def seen_by_members(
    model: Segmenter,
    score: Score,
    run: Run,
    threshold: float,
    reference: Segmenter | None,
    part: list[Sample],
    seed: int,
) -> tuple[Aligned, Batch]:
    """The true answers to some questions as the members see them, and what their masks are to be."""
    from popen.ensemble.members import align, ask, copies
    from popen.stages.learning import sample_row

    params, images, questions = run.params, _images(run, part), [sample.question for sample in part]
    members, tokens = params.ensemble.members, params.evaluate.max_new_tokens
    said = ask(model, reference, images, questions, params.ensemble, members, tokens, threshold, seed)
    pixels = copies(model.encoder.pixels(images), params.ensemble, members, seed)
    aligned = align(model, images, questions, [s.answer for s in part], pixels, score(said.features))
    # the other members' images and features are large, and only their embeddings are learned from
    aligned = replace(aligned, views=aligned.views[:1].clone(), features=aligned.features[:1])
    rows = [sample_row(sample, index) for index, sample in enumerate(part)]
    return aligned, model.encoder.batch(images, rows).to(model.device)


def train_attention(model: Segmenter, run: Run, seen: Sequence[tuple[Aligned, Batch]]) -> RefinementAttention:
    """Train the attention alone, on the preference split: true answers, M perturbed views, mask loss. The
    members are asked once, the attention sees them several times."""
    import torch

    from popen import devices
    from popen.ensemble.attention import RefinementAttention
    from popen.model.losses import mask_loss

    weights = run.params.sft.loss
    attention = RefinementAttention(model.codebook.scales, model.params.decoder.width).to(model.device)
    optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
    model.requires_grad_(False)
    for step in range(run.params.ensemble.steps):
        aligned, supervised = seen[step % len(seen)]
        with devices.autocast(run.params.evaluate.bf16):
            refined = attention(aligned.embeddings, aligned.scores)
            masks = model.decode(refined, aligned.features[0], supervised.images, supervised.image_of_target)
        parts = mask_loss(masks, supervised, weights)
        loss = weights.bce * parts["bce"] + weights.dice * parts["dice"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gate = float(attention.gate.detach().abs().mean())
        run.log_metrics({"attention/loss": loss.item(), "attention/gate": gate}, step)
    return attention.eval()


def tried(
    ensemble: Ensemble, run: Run, asked: Sequence[Sample], count: int, start: int
) -> list[tuple[int, str, Prediction]]:
    """What `count` members answer to the batch that begins at `start`: in the chosen mode, and in every mode
    at the chosen count."""
    from popen.evaluation.answering import prediction

    params, part, began = run.params, asked[start : start + run.params.evaluate.batch], time.perf_counter()
    questions, tokens = [sample.question for sample in part], params.evaluate.max_new_tokens
    gathered = ensemble.gather(_images(run, part), questions, count, tokens, params.seed + start)
    shared = time.perf_counter() - began
    found = []
    for mode in MODES if count == params.ensemble.members else (params.ensemble.mode,):
        began = time.perf_counter()
        answers = ensemble.refined(*gathered, mode)
        seconds = (shared + time.perf_counter() - began) / len(part)
        found += [
            (count, mode, prediction(s, a, ensemble.threshold, seconds))
            for s, a in zip(part, answers, strict=True)
        ]
    return found


def compared(asked: Sequence[Sample], found: Sequence[tuple[int, str, Prediction]]) -> list[dict[str, Any]]:
    """Figures of every number of members and mode that was tried."""
    from popen.evaluation.benchmark import rows, summarise

    table = []
    for count, mode in sorted({(count, MODES.index(mode)) for count, mode, _ in found}):
        predictions = [one for members, name, one in found if (members, MODES.index(name)) == (count, mode)]
        figures = summarise(rows(asked, predictions))
        seconds = sum(one.seconds for one in predictions) / len(predictions)
        shown = ("gIoU", "gIoU_matched", "chair_s", "missing", "area_ratio")
        chosen = {name: figures[name] for name in shown}
        table.append({"members": count, "mode": MODES[mode], "seconds": seconds, **chosen})
    return table


def choose_thresholds(run: Run, shared: Shared, asked: Sequence[Sample]) -> dict[str, float]:
    """Each plain system's threshold, by its greedy answers to validation questions."""
    from popen import devices
    from popen.stages.systems import PLAIN, answerer, load_plain

    params, size = run.params, run.params.evaluate.batch
    thresholds = {}
    for name in PLAIN:
        answer = answerer(load_plain(name, devices.device()), params, asked)
        inputs, settings = [MODELS / name, index("val")], [params.calibrate.questions, size]
        found = shared(name, inputs, settings, range(0, len(asked), size), answer)
        level, value = best_threshold(found, params.calibrate.thresholds)
        thresholds[name] = level
        run.log_metrics({f"threshold/{name}": level, f"val_gIoU/{name}": value})
        run.say(f"{name}: threshold {level:g}, gIoU on validation {value:.3f}")
        del answer  # and with it the model: two of a large one do not fit a device
    return thresholds


def fit_score(model: Segmenter, run: Run, shared: Shared, asked: Sequence[Sample], threshold: float) -> Score:
    """The preference score fitted on the members' answers to validation questions."""
    import numpy as np

    from popen.ensemble.score import correlation, fit

    params, size = run.params, run.params.evaluate.batch
    figures = shared(
        "score",
        [MODELS / "popen", index("val")],
        [params.calibrate.questions, size, params.ensemble, threshold],
        range(0, len(asked), size),
        lambda start: member_figures(model, run, asked, threshold, start),
    )
    features, quality = (np.stack(part) for part in zip(*figures, strict=True))
    score = fit(features, quality)
    fitted = correlation(score(features), quality)
    run.log_metrics({"score/correlation": fitted})
    weights = dict(zip(score.features, score.weight, strict=True))
    run.say(f"preference score: correlation {fitted:.2f}, weights {weights}")
    return score


def main() -> None:
    with stage("calibrate") as run:
        from popen import devices
        from popen.ensemble.members import Ensemble
        from popen.ensemble.score import reward_score
        from popen.predict import Settings, write_bundle
        from popen.stages.learning import pair_plan
        from popen.stages.model_record import log_model
        from popen.stages.systems import load_plain

        shared = Shared(run, devices.cores())
        params, device, size = run.params, devices.device(), run.params.evaluate.batch
        val, questions = [s for s in samples("val") if s.objects], params.calibrate.questions
        thresholds = choose_thresholds(run, shared, spread(val, questions))
        THRESHOLDS.write_text(json.dumps(thresholds, indent=1) + "\n", encoding="utf-8")

        # the score's are the first, by default MUSE's: where a question refers to one thing, members differ
        # by their masks alone, which a score can hardly judge
        asked = val[:questions]
        model, threshold, reference = load_plain("popen", device), thresholds["popen"], None
        if params.ensemble.score == "reward":
            reference, score = load_plain("sft", device), reward_score()
        else:
            score = fit_score(model, run, shared, asked, threshold)
        plan = pair_plan([sample for sample in samples("preference") if sample.targets], params.seed)

        def see(number: int) -> list[tuple[Aligned, Batch]]:
            part = [plan(number * ATTENTION_BATCH + place) for place in range(ATTENTION_BATCH)]
            return [seen_by_members(model, score, run, threshold, reference, part, params.seed + number)]

        before = None if reference is None else MODELS / "sft"
        batches = range(min(ATTENTION_BATCHES, params.ensemble.steps))
        inputs = [MODELS / "popen", *filter(None, [before]), index("preference")]
        seen = shared("attention", inputs, [params.ensemble, threshold, score.to_dict()], batches, see)
        attention = train_attention(model, run, seen)
        settings = Settings(threshold, params.evaluate.max_new_tokens, params.ensemble, params.evaluate.bf16)
        write_bundle(BUNDLE, MODELS / "popen", before, score, attention, settings)
        run.curves(CURVES / "calibrate.csv")

        ensemble = Ensemble(model, reference, score, attention, params.ensemble, threshold)
        # the longest first, so that the cores end at about the same time
        sizes = sorted({*SIZES, params.ensemble.members}, reverse=True)
        tries = list(product(sizes, range(0, len(asked), size)))
        answered = shared(
            "members",
            [BUNDLE, index("val")],
            [params.calibrate.questions, size],
            range(len(tries)),
            lambda number: tried(ensemble, run, asked, *tries[number]),
        )
        table = compared(asked, answered)
        for row in table:
            run.say(str(row))
        log_model(run, BUNDLE)
        Path("metrics").mkdir(exist_ok=True)
        Path("metrics/ensemble.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        shared.clear()


if __name__ == "__main__":
    main()
