"""Stage `calibrate`: mask thresholds and preference score from validation alone, the attention from the
preference split.

artifacts/thresholds.json         logit threshold of each system
artifacts/models/popen+ensemble   the calibrated ensemble, a bundle (see popen.predict)
metrics/ensemble.json             members against quality and seconds, and the modes compared
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popen.stages.run import Run, stage

if TYPE_CHECKING:
    from popen.ensemble.attention import RefinementAttention
    from popen.ensemble.members import Ensemble
    from popen.ensemble.score import Score
    from popen.evaluation.prediction import Prediction
    from popen.model.generate import Answer
    from popen.model.segmenter import Segmenter
    from popen.samples import Sample

SIZES = (1, 2, 4, 8)  # ensemble sizes of the report's figure
MODES = ("attention", "mean", "best", "probability")
ATTENTION_BATCHES = 20  # of 16 questions each


def best_threshold(
    found: Sequence[tuple[Sample, Answer, float]], levels: Sequence[float]
) -> tuple[float, float]:
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


def fit_score(model: Segmenter, run: Run, asked: Sequence[Sample], threshold: float) -> tuple[Score, float]:
    """The preference score fitted on the members' answers to validation questions, and its correlation."""
    import numpy as np

    from popen.data.images import open_image
    from popen.ensemble.members import ask
    from popen.ensemble.score import correlation, fit
    from popen.evaluation.answering import prediction
    from popen.evaluation.benchmark import rows

    params, size = run.params, run.params.evaluate.batch
    features, quality = [], []
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        images = [open_image(Path(params.data.root), s.image, params.data.max_pixels) for s in part]
        said = ask(
            model,
            None,
            images,
            [sample.question for sample in part],
            params.ensemble,
            params.ensemble.members,
            params.evaluate.max_new_tokens,
            threshold,
            params.seed + start,
        )
        features.append(said.features)
        predictions = [
            [prediction(s, a, threshold, 0.0) for s, a in zip(part, answers, strict=True)]
            for answers in said.answers
        ]
        quality.append(np.stack([rows(part, member)["matched"].to_numpy(float) for member in predictions], 1))
    x, y = np.concatenate(features), np.concatenate(quality)
    score = fit(x, y)
    return score, correlation(score(x), y)


def train_attention(
    model: Segmenter, score: Score, run: Run, threshold: float, reference: Segmenter | None
) -> RefinementAttention:
    """Train the attention alone, on the preference split: true answers, M perturbed views, mask loss."""
    import torch
    from tqdm import tqdm

    from popen.data.images import open_image
    from popen.ensemble.attention import RefinementAttention
    from popen.ensemble.members import align, ask
    from popen.model.losses import mask_loss
    from popen.stages.learning import pair_plan, sample_row, samples

    params = run.params
    attention = RefinementAttention(model.codebook.scales, model.params.decoder.width).to(model.device)
    optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
    asked = [sample for sample in samples("preference") if sample.targets]
    plan = pair_plan(asked, params.seed)
    model.requires_grad_(False)
    seen = []  # the members are asked once, the attention sees them several times
    for number in tqdm(range(min(ATTENTION_BATCHES, params.ensemble.steps)), desc="members", unit="batch"):
        part = [plan(number * 16 + place) for place in range(16)]
        images = [open_image(Path(params.data.root), s.image, params.data.max_pixels) for s in part]
        questions = [sample.question for sample in part]
        said = ask(
            model,
            reference,
            images,
            questions,
            params.ensemble,
            params.ensemble.members,
            params.evaluate.max_new_tokens,
            threshold,
            params.seed + number,
        )
        aligned = align(model, images, questions, [s.answer for s in part], said.pixels, score(said.features))
        rows = [sample_row(sample, index) for index, sample in enumerate(part)]
        seen.append((aligned, model.encoder.batch(images, rows).to(model.device)))
    for step in range(params.ensemble.steps):
        aligned, supervised = seen[step % len(seen)]
        refined = attention(aligned.embeddings, aligned.scores)
        masks = model.decode(refined, aligned.features[0], supervised.images, supervised.image_of_target)
        parts = mask_loss(masks, supervised, params.sft.loss)
        loss = params.sft.loss.bce * parts["bce"] + params.sft.loss.dice * parts["dice"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gate = float(attention.gate.abs().mean())
        run.log_metrics({"attention/loss": loss.item(), "attention/gate": gate}, step)
    return attention.eval()


def tried(ensemble: Ensemble, run: Run, asked: Sequence[Sample], count: int) -> list[dict[str, Any]]:
    """Figures of `count` members on validation: in the chosen mode, and in every mode at the chosen count."""
    import time

    from tqdm import tqdm

    from popen.data.images import open_image
    from popen.evaluation.answering import prediction
    from popen.evaluation.benchmark import rows, summarise

    params, size = run.params, run.params.evaluate.batch
    modes = MODES if count == params.ensemble.members else (params.ensemble.mode,)
    found: dict[str, list[Prediction]] = {mode: [] for mode in modes}
    for start in tqdm(range(0, len(asked), size), desc=f"calibrate {count} members", unit="batch"):
        part, began = asked[start : start + size], time.perf_counter()
        images = [open_image(Path(params.data.root), s.image, params.data.max_pixels) for s in part]
        questions, tokens = [sample.question for sample in part], params.evaluate.max_new_tokens
        gathered = ensemble.gather(images, questions, count, tokens, params.seed + start)
        shared = time.perf_counter() - began
        for mode, predictions in found.items():
            began = time.perf_counter()
            answers = ensemble.refined(*gathered, mode)
            seconds = (shared + time.perf_counter() - began) / len(part)
            predictions += [
                prediction(s, a, ensemble.threshold, seconds) for s, a in zip(part, answers, strict=True)
            ]
    table = []
    for mode, predictions in found.items():
        figures = summarise(rows(asked, predictions))
        seconds = sum(one.seconds for one in predictions) / len(predictions)
        names = ("gIoU", "gIoU_matched", "chair_s", "missing")
        table.append(
            {"members": count, "mode": mode, "seconds": seconds, **{name: figures[name] for name in names}}
        )
        run.say(str(table[-1]))
    return table


def main() -> None:
    with stage("calibrate") as run:
        from popen.ensemble import members
        from popen.ensemble.score import reward_score
        from popen.evaluation.answering import answers
        from popen.model.segmenter import Segmenter
        from popen.predict import Settings, write_bundle
        from popen.stages.learning import MODELS, samples
        from popen.stages.model_record import log_model
        from popen.stages.systems import BUNDLE, PLAIN, THRESHOLDS

        params = run.params
        asked = [s for s in samples("val") if s.objects][: params.calibrate.questions]
        models = {name: Segmenter.load(MODELS / name) for name in PLAIN}
        thresholds = {}
        for name, model in models.items():
            answered = answers(
                model,
                Path(params.data.root),
                asked,
                params.evaluate,
                params.data.max_pixels,
                f"calibrate {name}",
            )
            level, value = best_threshold(list(answered), params.calibrate.thresholds)
            thresholds[name] = level
            run.log_metrics({f"threshold/{name}": level, f"val_gIoU/{name}": value})
            run.say(f"{name}: threshold {level:g}, gIoU on validation {value:.3f}")
        THRESHOLDS.write_text(json.dumps(thresholds, indent=1) + "\n", encoding="utf-8")

        model, threshold = models["popen"], thresholds["popen"]
        if params.ensemble.score == "reward":
            reference, score = models["sft"], reward_score()
        else:
            reference = None
            score, correlation = fit_score(model, run, asked, threshold)
            run.log_metrics({"score/correlation": correlation})
            weights = dict(zip(score.features, score.weight, strict=True))
            run.say(f"preference score: correlation {correlation:.2f}, weights {weights}")
        attention = train_attention(model, score, run, threshold, reference)
        settings = Settings(threshold, params.evaluate.max_new_tokens, params.ensemble)
        before = None if reference is None else MODELS / "sft"
        write_bundle(BUNDLE, MODELS / "popen", before, score, attention, settings)
        run.curves(Path("artifacts/curves/calibrate.csv"))

        together = model.device.type == "cuda"
        ensemble = members.Ensemble(model, reference, score, attention, params.ensemble, threshold, together)
        table = [
            row
            for count in sorted({*SIZES, params.ensemble.members})
            for row in tried(ensemble, run, asked, count)
        ]
        log_model(run, BUNDLE)
        Path("metrics").mkdir(exist_ok=True)
        Path("metrics/ensemble.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
