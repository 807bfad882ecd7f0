"""Miniature models and samples: real parts, small sizes."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from popen.masks import encode
from popen.model.language import train_tokenizer
from popen.model.segmenter import Segmenter
from popen.params import DecoderParams, LanguageParams, ModelParams, VisionParams
from popen.samples import Region, Sample

CATEGORIES = ["cup", "fork"]


def mini_params() -> ModelParams:
    return ModelParams(
        vision=VisionParams(name="timm:test_resnet", pretrained="", image_size=32, levels=[2, 1], shuffle=1),
        language=LanguageParams(
            name="custom",
            vocab=300,
            width=32,
            layers=2,
            heads=2,
            intermediate=64,
            max_length=128,
            lora_r=0,
            lora_alpha=16,
            lora_targets=["q_proj", "v_proj"],
        ),
        decoder=DecoderParams(width=16, heads=2, layers=1, tokens=2, detail=4),
    )


def square(left: int, top: int, side: int, size: int = 32) -> Region:
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return Region("the cup", "cup", encode(mask))


@pytest.fixture
def mini_model() -> Segmenter:
    torch.manual_seed(0)
    words = ["USER: What could I drink from? ASSISTANT: It is the cup and the fork."] * 3
    return Segmenter(mini_params(), train_tokenizer(words, 300), CATEGORIES).eval()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.fixture
def sample() -> Sample:
    cup = square(4, 4, 10)
    fork = Region("the fork", "fork", square(20, 20, 8).rle)
    return Sample(
        uid="muse/train/0/0",
        benchmark="muse",
        split="train",
        image="images/0.png",
        height=32,
        width=32,
        question="What could I use?",
        answer="It is the cup {seg} and the fork {seg}.",
        targets=(cup, fork),
        objects=(cup, fork),
    )
