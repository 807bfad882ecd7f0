"""Where each system's model lies, and how a system answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from popen.data.images import open_image
from popen.ensemble.members import Ensemble
from popen.evaluation.answering import answers
from popen.model.generate import Answer
from popen.model.segmenter import Segmenter
from popen.params import Params
from popen.predict import load_ensemble
from popen.samples import Sample
from popen.stages.learning import MODELS

PLAIN = ("sft", "control", "chosen", "popen")  # systems that are one model
BUNDLE = MODELS / "popen+ensemble"
THRESHOLDS = Path("artifacts/thresholds.json")


def threshold(system: str) -> float:
    """The mask threshold (a logit) that `calibrate` chose for a system on validation."""
    return float(json.loads(THRESHOLDS.read_text(encoding="utf-8"))[system.removesuffix("+ensemble")])


def ensemble_answers(
    ensemble: Ensemble,
    params: Params,
    samples: Sequence[Sample],
    count: int,
    name: str,
) -> Iterator[tuple[Sample, Answer, float]]:
    """The ensemble's answers in the order of `samples`, with the seconds a question."""
    size = params.evaluate.batch
    with tqdm(total=len(samples), desc=name, unit="question", mininterval=2.0) as bar:
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            began = time.perf_counter()
            images = [open_image(Path(params.data.root), s.image, params.data.max_pixels) for s in part]
            questions = [sample.question for sample in part]
            seed = params.seed + start
            found = ensemble.answer(images, questions, count, params.evaluate.max_new_tokens, seed)
            seconds = (time.perf_counter() - began) / len(part)
            for sample, answer in zip(part, found, strict=True):
                yield sample, answer, seconds
            bar.update(len(part))


def load(system: str) -> Segmenter | Ensemble:
    """A system's trained model, or the bundle of the ensemble."""
    return load_ensemble(BUNDLE)[0] if system == "popen+ensemble" else Segmenter.load(MODELS / system)


def system_answers(
    model: Segmenter | Ensemble, params: Params, samples: Sequence[Sample], name: str
) -> Iterator[tuple[Sample, Answer, float]]:
    """A system's answers in the order of `samples`."""
    if isinstance(model, Ensemble):
        return ensemble_answers(model, params, samples, params.ensemble.members, name)
    return answers(model, Path(params.data.root), samples, params.evaluate, params.data.max_pixels, name)
