"""A LLaVA-1.5 in small, on disk as the hub has it, and its vision tower as an open_clip checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from popen.params import LanguageParams, ModelParams, VisionParams
from tests.conftest import mini_params

CORPUS = ["USER: What could I drink from, and where is it? ASSISTANT: It is the cup and the fork."] * 3
VIT = "ViT-mini-llava"  # the tower's open_clip name; quick GELU, as OpenAI's
SIZE, WIDTH, BLOCKS = 32, 64, 4


def tokenizer() -> Any:
    """Llama's kind: byte fallback, "▁" for spaces; with LLaVA's two tokens behind it."""
    raw = Tokenizer(models.BPE(byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    made.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return made


def write_llava(folder: Path) -> LlavaForConditionalGeneration:
    """Random weights in shards, with tokenizer and processor; its vocabulary has rows to spare."""
    words = tokenizer()
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=16,
        initializer_factor=4.0,  # features that differ from place to place
    )
    text = LlamaConfig(
        vocab_size=len(words) + 10,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // 8) ** 2,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.save_pretrained(folder, max_shard_size="100KB")
    size = {"height": SIZE, "width": SIZE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return llava


def write_tower(llava: LlavaForConditionalGeneration, folder: Path) -> Path:
    """LLaVA's vision tower as a checkpoint file of open_clip's, and its config, made known to open_clip."""
    heads = {"image_size": SIZE, "layers": BLOCKS, "width": WIDTH, "patch_size": 8, "head_width": WIDTH // 2}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": heads, "text_cfg": text}
    (folder / f"{VIT}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{VIT}.json")
    torch.manual_seed(2)
    state = open_clip.create_model(VIT).state_dict()
    state |= {f"visual.{name}": value for name, value in _as_open_clip(llava).items()}
    torch.save(state, folder / "clip.pt")
    return folder / "clip.pt"


def _as_open_clip(llava: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    found, parts = {}, {}
    for name, value in llava.model.vision_tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if ".self_attn." in name:
            parts[name] = value
        else:
            found[name] = value
    for block in range(BLOCKS):
        for kind in ("weight", "bias"):
            start = f"transformer.resblocks.{block}"
            qkv = [parts[f"{start}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{start}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return found


def llava_params(folder: Path, tower: Path, **language: Any) -> ModelParams:
    """The parameters that name both, with LoRA."""
    mini = mini_params()
    raw = mini.language.model_dump() | {"name": str(folder), "lora_r": 2} | language
    vision = VisionParams(name=VIT, pretrained=str(tower), image_size=SIZE, levels=[BLOCKS - 2, 1], shuffle=1)
    return mini.model_copy(update={"language": LanguageParams(**raw), "vision": vision, "tally": False})
