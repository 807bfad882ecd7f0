"""What is measured: a model with random weights, drawn images, and questions with answers of usual length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from popen.masks import encode
from popen.model.batches import Row
from popen.model.codebook import token_names
from popen.model.language import PROMPT, train_tokenizer
from popen.model.segmenter import Segmenter
from popen.params import DecoderParams, LanguageParams, ModelParams, SftWeights, VisionParams, load
from popen.preference.records import MaskPairs, TextPair
from popen.samples import Region

PIXELLM = SftWeights(ce=1.0, bce=2.0, dice=0.5, refine=1.0, dense=0.0, describe=0.0, point=0.0, inventory=0.0)
CHOSEN = (
    "The person on the left could drink from the large white cup {seg} that stands near the edge of the "
    "wooden table, and would take the small silver fork {seg} beside the plate for the cake."
)
REJECTED = (
    "The person on the left could drink from the large white cup {seg} that stands near the edge of the "
    "wooden table, and would take the sharp kitchen knife {seg} beside the plate for the cake."
)
QUESTIONS = (
    "What could the person on the left of the picture use to drink and to eat the cake?",
    "Which things on the table would somebody need for a cup of coffee and a piece of cake?",
    "What is there to drink from, and what to eat with, for the person who sits nearest to the window?",
    "Which of the things here are for drinking and eating?",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of the model and of the work."""

    model: ModelParams
    images: tuple[int, ...]  # images a training step, tried from the first until one fits
    answers: int  # questions answered at once
    asked: int  # questions an ensemble answers at once
    alone: int  # questions answered one by one, for the comparison
    words: int  # tokens an answer
    steps: int  # training steps measured


def llava_7b(folder: Path) -> Scale:
    """LLaVA-1.5-7B's sizes; `folder` receives the language model's configuration. Loads no weights."""
    from transformers import LlamaConfig

    width, layers, heads, intermediate, vocab = 4096, 32, 32, 11008, 32064
    LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    model = ModelParams(
        vision=VisionParams(
            name="ViT-L-14-336", pretrained="", image_size=448, levels=[22, 14], shuffle=1
        ),  # 448 / 14 = 32 places a side, 1024 image tokens
        language=LanguageParams(
            name=str(folder),
            vocab=vocab,
            width=width,
            layers=layers,
            heads=heads,
            intermediate=intermediate,
            max_length=4096,
            lora_r=8,
            lora_alpha=16,
            lora_targets=["q_proj", "v_proj"],
            dtype="bfloat16",
        ),
        decoder=DecoderParams(width=256, heads=8, layers=1, tokens=3, detail=0),
    )
    return Scale(model, images=(10, 9, 8, 6, 4, 2, 1), answers=16, asked=4, alone=4, words=64, steps=5)


def default_scale() -> Scale:
    """The model of params.yaml."""
    return Scale(load().model, images=(8,), answers=16, asked=8, alone=8, words=48, steps=5)


def build(scale: Scale, device: torch.device) -> Segmenter:
    """The model with random weights, made on `device`; tower frozen, as every full-scale training has it."""
    params = scale.model
    texts = [PROMPT.format(question=q) + " " + a for q in QUESTIONS for a in (CHOSEN, REJECTED)]
    tokenizer = train_tokenizer([text.replace("{seg}", "") for text in texts], params.language.vocab)
    ours = 1 + len(token_names(len(params.vision.levels), params.decoder.tokens))  # the image's token too
    missing = params.language.vocab - ours - len(tokenizer)
    tokenizer.add_tokens([f"<unused_{number}>" for number in range(missing)])  # none where it is negative
    torch.manual_seed(0)
    with device:
        model = Segmenter(params, tokenizer, ["cup", "fork"], pretrained=False)
    model.to(device).tower.requires_grad_(False)
    write_targets(model)
    return model.eval()


@torch.no_grad()
def write_targets(model: Segmenter) -> None:
    """Make the random model write "It is the cup" and a target, over and over, so that its answers have a
    known length and masks to decode.

    The blocks hardly change the residual (the last matrix of each is scaled by 1e-4, which costs the same
    time), so the last state is the token's own embedding, and the head answers it with the next token.
    """
    causal = model.causal
    for layer in causal.base_model.layers:
        layer.self_attn.o_proj.weight.mul_(1e-4)
        layer.mlp.down_proj.weight.mul_(1e-4)
    ends = causal.get_input_embeddings(), causal.get_output_embeddings()
    # rows that train apart from a frozen rest lie in an adapter of PEFT's
    adapters = [getattr(end, "token_adapter", None) for end in ends]
    embedded, head = (
        end.weight if adapter is None else adapter.base_layer.weight
        for end, adapter in zip(ends, adapters, strict=True)
    )
    if head is embedded:
        ends[1].weight = head = nn.Parameter(embedded.detach().clone())
    codebook = model.tokenizer.convert_tokens_to_ids(model.encoder.codebook)
    embedded[codebook] = torch.randn_like(embedded[codebook]) * embedded.std()  # they may all start alike
    said = list(dict.fromkeys(model.encoder.answer_ids("It is the cup {seg}")[:-1]))  # each has one successor
    before = [model.encoder.question_ids("?")[-1], *said]
    after = [*said, said[0]]
    head[after] = 0.0
    for one, other in zip(before, after, strict=True):
        head[other] += embedded[one]
    for weight, adapter in zip((embedded, head), adapters, strict=True):
        if adapter is not None:
            for name, delta in adapter.trainable_tokens_delta.items():
                delta.copy_(weight[adapter.token_indices[name]])


@dataclass(frozen=True)
class Work:
    """Images on disk (uncompressed, so that no decoder is measured) and what is asked about them."""

    root: Path
    pairs: list[TextPair]  # one an image
    masks: MaskPairs

    @property
    def images(self) -> list[Image.Image]:
        return [Image.open(self.root / pair.image).convert("RGB") for pair in self.pairs]

    @property
    def questions(self) -> list[str]:
        return [pair.question for pair in self.pairs]


def draw(model: Segmenter, root: Path, count: int) -> Work:
    """`count` images, each with a question, a corrected and a sampled answer, two targets and a mask pair."""
    size, random = model.encoder.size, np.random.default_rng(0)
    marks: dict[str, Any] = {}
    chosen, rejected = (model.encoder.answer_ids(answer) for answer in (CHOSEN, REJECTED))
    for name, ids, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        marks[f"{name}_changed"] = [token not in other for token in ids]
        marks[f"{name}_ref"] = [0.0] * len(ids)  # the time does not depend on the values
    pairs = []
    for number in range(count):
        pixels = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.bmp")
        mask = np.zeros((size, size), dtype=bool)
        mask[size // 4 : size // 2, size // 4 : size // 2] = True
        cup, fork = Region("the cup", "cup", encode(mask)), Region("the fork", "fork", encode(mask.T))
        question = QUESTIONS[number % len(QUESTIONS)]
        pairs.append(TextPair(str(number), f"{number}.bmp", question, CHOSEN, REJECTED, (cup, fork), **marks))
    shape = (count, model.codebook.scales, model.params.decoder.width)
    winner, loser, reference = (torch.randn(shape) for _ in range(3))
    better = torch.rand(count, size, size) > 0.5
    masks = MaskPairs(
        [pair.uid for pair in pairs],
        [0] * count,
        winner,
        loser,
        reference,
        better,
        ~better,
        torch.zeros((count, size, size), dtype=torch.float16),
        torch.zeros((count, 3)),
    )
    return Work(root, pairs, masks)


def rows_of(pairs: Sequence[TextPair]) -> list[Row]:
    """One unanswered question an image."""
    return [Row(index, pair.question) for index, pair in enumerate(pairs)]
