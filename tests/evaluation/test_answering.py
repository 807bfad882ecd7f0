"""Answers become predictions at the images' own sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from popen.evaluation import answering
from popen.evaluation.answering import (
    answer_batch,
    confidence,
    mask_confidence,
    prediction,
    resize_logits,
)
from popen.masks import area, decode
from popen.model.batches import Row
from popen.model.generate import Answer, generate
from popen.model.segmenter import Segmenter
from popen.params import EvaluateParams
from popen.samples import Sample

PARAMS = EvaluateParams(batch=3, max_new_tokens=24, bootstrap=1)


def test_logits_take_the_images_size() -> None:
    logits = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    assert resize_logits(logits, 2, 2) is logits
    wide = resize_logits(logits, 2, 4)
    assert wide.shape == (1, 2, 4)
    assert wide[0].tolist() == [[1.0, 1.5, 2.5, 3.0], [5.0, 5.5, 6.5, 7.0]]  # bilinear, pixels are areas
    assert resize_logits(torch.zeros(0, 2, 2), 5, 6).shape == (0, 5, 6)


def test_mask_confidence_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0], [-9.0, -9.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    confident = torch.sigmoid(torch.tensor([0.0, 2.0])).mean().item()
    assert mask_confidence(logits, -0.5).tolist() == pytest.approx([confident, 0.0])
    assert mask_confidence(logits, 0.5)[0].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())


def test_confidence_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0]], [[-1.0, -1.0, 1.0]]])
    inside = torch.tensor([2.0, 1.0]).sigmoid()
    assert confidence(logits, 0.5) == pytest.approx(float(inside.mean()))
    lower = (torch.tensor([0.0, 2.0, 2.0]).sigmoid().mean() + torch.tensor(1.0).sigmoid()) / 2
    assert confidence(logits, -0.5) == pytest.approx(float(lower))
    assert confidence(logits[:1], 9.0) == 0.0  # an empty mask
    assert confidence(logits[:0], 0.0) == 1.0  # no mask at all


def test_a_prediction_cuts_at_the_threshold_and_at_the_images_size(sample: Sample) -> None:
    logits = torch.full((1, 4, 4), -3.0)
    logits[0, :2, :2] = 1.0
    answer = Answer("the cup {seg}", [1], -0.25, torch.zeros(1, 2, 3), logits)
    tall = replace(sample, height=8, width=4)
    found = prediction(tall, answer, 0.5, 2.0)
    assert (found.uid, found.text, found.loglik, found.seconds) == (sample.uid, "the cup {seg}", -0.25, 2.0)
    (rle,) = found.masks
    assert rle["size"] == [8, 4]
    expected = np.zeros((8, 4), dtype=bool)
    expected[:3, :2] = True  # twice as high: of the fourth row the logit is 3/4 * 1 - 1/4 * 3 = 0, below 0.5
    assert (decode(rle) == expected).all()
    assert area(prediction(tall, answer, 1.5, 0.0).masks[0]) == 0
    assert area(prediction(tall, answer, -4.0, 0.0).masks[0]) == 32
    assert found.confidence == pytest.approx(float(torch.tensor(1.0).sigmoid()))


def test_an_image_is_opened_once(
    taught: Segmenter, data: tuple[Path, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, samples = data
    opened, reads = [], answering.open_image

    def counted(folder: Path, image: str, pixels: int) -> Image.Image:
        opened.append(image)
        return reads(folder, image, pixels)

    monkeypatch.setattr(answering, "open_image", counted)
    answer_batch(taught, root, [samples[1], samples[0], samples[1]], PARAMS, 2000)
    assert sorted(opened) == sorted({samples[0].image, samples[1].image})


def test_answers_come_in_the_order_of_the_questions(
    taught: Segmenter, data: tuple[Path, list[Sample]]
) -> None:
    root, samples = data
    asked = [samples[1], samples[0], samples[3], samples[1], samples[2]]
    parts = [asked[: PARAMS.batch], asked[PARAMS.batch :]]
    found = [one for part in parts for one in answer_batch(taught, root, part, PARAMS, 2000)]
    assert [sample for sample, _, _ in found] == asked
    for sample, answer, seconds in found:
        (alone,) = generate(taught, [Image.open(root / sample.image)], [Row(0, sample.question)], 24)
        assert answer.text == alone.text == sample.answer
        torch.testing.assert_close(answer.masks, alone.masks, atol=1e-3, rtol=1e-3)
        assert 0 < seconds < 60
    assert found[0][2] == found[1][2]  # each has its share of the batch
