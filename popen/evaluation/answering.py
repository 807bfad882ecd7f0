"""A model's free-running answers to a set of questions, as predictions at the images' own sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from popen.data.images import open_image
from popen.evaluation.prediction import Prediction
from popen.masks import encode
from popen.model.batches import Row
from popen.model.generate import Answer, generate
from popen.model.segmenter import Segmenter
from popen.params import EvaluateParams
from popen.samples import Sample


def resize_logits(logits: Tensor, height: int, width: int) -> Tensor:
    """Mask logits (N, H, W) -> (N, height, width)."""
    if logits.shape[-2:] == (height, width) or not len(logits):
        return logits.new_zeros((0, height, width)) if not len(logits) else logits
    return F.interpolate(logits[:, None], size=(height, width), mode="bilinear")[:, 0]


def mask_confidence(logits: Tensor, threshold: float) -> Tensor:
    """Mask logits (N, H, W) -> (N,): mean foreground probability of the pixels above the threshold (a logit),
    as Mask2Former scores its masks; 0 for an empty mask."""
    inside = logits > threshold
    return (logits.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)


def confidence(logits: Tensor, threshold: float) -> float:
    """Mean `mask_confidence` of an answer's masks (N, H, W); 1 for none (ours)."""
    return float(mask_confidence(logits, threshold).mean()) if len(logits) else 1.0


def prediction(sample: Sample, answer: Answer, threshold: float, seconds: float) -> Prediction:
    """An answer -> masks at the image's size (logit > threshold), with its scores."""
    logits = resize_logits(answer.masks, sample.height, sample.width)
    masks = tuple(encode(mask) for mask in (logits > threshold).cpu().numpy())
    return Prediction(
        sample.uid, answer.text, masks, answer.logp, confidence(answer.masks, threshold), seconds
    )


Timed = tuple[Sample, Answer, float]  # with the seconds of the question (its share of its batch)


@torch.no_grad()
def answer_batch(
    model: Segmenter, root: Path, samples: Sequence[Sample], params: EvaluateParams, max_pixels: int
) -> list[Timed]:
    """Greedy answers to at most `params.batch` questions."""
    start = time.perf_counter()
    images = sorted({sample.image for sample in samples})  # several may be about one
    rows = [Row(images.index(sample.image), sample.question) for sample in samples]
    opened = [open_image(root, image, max_pixels) for image in images]
    found = generate(model, opened, rows, params.max_new_tokens)
    seconds = (time.perf_counter() - start) / len(samples)
    return [(sample, answer, seconds) for sample, answer in zip(samples, found, strict=True)]
