"""Miniature models and samples: real parts, small sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from popen.masks import decode, encode
from popen.model.batches import Row
from popen.model.language import train_tokenizer
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.params import DecoderParams, LanguageParams, ModelParams, SftWeights, VisionParams
from popen.samples import Region, Sample

CATEGORIES = ["cup", "fork"]
COLOURS = {"cup": (200, 40, 40), "fork": (40, 60, 190)}
WEIGHTS = SftWeights(ce=1.0, bce=2.0, dice=0.5, refine=1.0, dense=0.0, describe=0.0, point=0.0, inventory=0.0)

# a busy machine is no failure: no limit on an example's time
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pipeline, the longest file, comes first, then those that wait for servers: the quick ones fill the
    gaps behind them."""
    early = ("pipeline", "flows", "remote")
    items.sort(key=lambda item: early.index(name) if (name := item.path.parent.name) in early else len(early))


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
        tally=True,
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


def draw(root: Path, number: int) -> Sample:
    """A red square, the cup, beside a blue one, the fork; every second question asks for the cup alone."""
    cup = square(3 + 3 * (number % 2), 2 + 2 * (number // 2), 10)
    fork = Region("the fork", "fork", square(18, 19 - 2 * number, 9).rle)
    pixels = np.full((32, 32, 3), 230, dtype=np.uint8)
    for thing in (cup, fork):
        pixels[decode(thing.rle)] = COLOURS[thing.category]
    image = f"images/{number}.png"
    (root / "images").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(root / image)
    both = number % 2 == 0
    return Sample(
        uid=f"muse/train/{number}/0",
        benchmark="muse",
        split="train",
        image=image,
        height=32,
        width=32,
        question="What could I use?" if both else "What could I drink from?",
        answer="It is the cup {seg} and the fork {seg}." if both else "It is the cup {seg}.",
        targets=(cup, fork) if both else (cup,),
        objects=(cup, fork),
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    """A data root with four drawn images, and a question about each."""
    root = tmp_path_factory.mktemp("data")
    return root, [draw(root, number) for number in range(4)]


@pytest.fixture(scope="session")
def taught(data: tuple[Path, list[Sample]]) -> Segmenter:
    """A miniature model that knows the four questions by heart. Shared: copy it before you change it."""
    root, samples = data
    torch.manual_seed(0)
    texts = [f"USER: {sample.question} ASSISTANT: {sample.answer}" for sample in samples]
    model = Segmenter(mini_params(), train_tokenizer(texts, 300), CATEGORIES).train()
    rows = [
        Row(index, sample.question, sample.answer, [decode(target.rle) for target in sample.targets])
        for index, sample in enumerate(samples)
    ]
    batch = model.encoder.batch([Image.open(root / sample.image) for sample in samples], rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    # enough for the words, not for perfect masks, nor for sampled answers without a fault
    for _ in range(20):
        loss, _ = sft_loss(model(batch), batch, WEIGHTS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A Prefect server with an empty database; its address. One for a process that runs tests: what Prefect
    sends events with belongs to a process, and stays with the first server that it met."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()
