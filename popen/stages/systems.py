"""Loading the systems that are compared, and how a system answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from popen.data.images import open_image
from popen.ensemble.members import Ensemble
from popen.evaluation.answering import Timed, answer_batch
from popen.model.segmenter import Segmenter
from popen.params import Params
from popen.predict import load_ensemble
from popen.samples import Sample
from popen.stages.artifacts import BUNDLE, MODELS

PLAIN = ("sft", "control", "chosen", "popen")  # systems that are one model


def ensemble_batch(
    ensemble: Ensemble, params: Params, samples: Sequence[Sample], count: int, start: int
) -> list[Timed]:
    """The ensemble's answers to a batch of questions, whose first is number `start` of the set: its seed."""
    began = time.perf_counter()
    images = [open_image(Path(params.data.root), s.image, params.data.max_pixels) for s in samples]
    questions = [sample.question for sample in samples]
    found = ensemble.answer(images, questions, count, params.evaluate.max_new_tokens, params.seed + start)
    seconds = (time.perf_counter() - began) / len(samples)
    return [(sample, answer, seconds) for sample, answer in zip(samples, found, strict=True)]


def load(system: str, device: torch.device) -> Segmenter | Ensemble:
    """A system's trained model, or the bundle of the ensemble, on a device."""
    return load_ensemble(BUNDLE)[0].to(device) if system == "popen+ensemble" else load_plain(system, device)


def load_plain(system: str, device: torch.device) -> Segmenter:
    """The trained model of a system that is one, on a device."""
    return Segmenter.load(MODELS / system).to(device)


def answerer(
    model: Segmenter | Ensemble, params: Params, samples: Sequence[Sample]
) -> Callable[[int], list[Timed]]:
    """How a system answers: number of a question -> the answers to it and to the rest of its batch."""
    root, pixels, size = Path(params.data.root), params.data.max_pixels, params.evaluate.batch
    if isinstance(model, Ensemble):
        count = params.ensemble.members
        return lambda start: ensemble_batch(model, params, samples[start : start + size], count, start)
    return lambda start: answer_batch(model, root, samples[start : start + size], params.evaluate, pixels)
