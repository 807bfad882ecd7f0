"""A trained model as a LLaVA-1.5 of the hub's layout, adapters merged, and what makes masks beside it.

FOLDER/             config, weights in shards, tokenizer and processor of `LlavaForConditionalGeneration`
FOLDER/segmenter/   projector, codebook, neck, decoder and heads as `Segmenter.save` writes them; its
                    language model is the folder above
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from popen.errors import ModelError
from popen.model.language import IMAGE
from popen.model.segmenter import Segmenter

PARTS = "segmenter"


def export(source: Path, folder: Path) -> None:
    """Read the model saved in `source` and write `folder`, which must be empty or not exist.

    Merged weights have the language model's `dtype`, in which LoRA's part is rounded; in float32 answers and
    masks stay as they are. Raises ModelError for a model that is no LLaVA with LoRA.
    """
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    model = Segmenter.load(source)
    visual, size = model.tower.net, model.params.vision.image_size
    plain = model.params.vision.shuffle == 1 and not model.params.tally and hasattr(visual, "conv1")
    if not model.params.language.lora_r or not plain:
        what = "only a CLIP tower, shuffle 1, no tally and LoRA"
        raise ModelError(f"{source}: {what} make a LLaVA-1.5 to export")
    _write_parts(model, folder / PARTS)
    merged = model.language.merge_and_unload()
    tower, patch = _clip(visual, size), visual.conv1.kernel_size[0]
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=merged.config,
        image_token_index=model.encoder.image_id,
        image_seq_length=model.encoder.image_tokens,
        vision_feature_layer=model.params.vision.levels[0] - tower.config.num_hidden_layers,
        tie_word_embeddings=merged.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.language_model, llava.lm_head, llava.model.vision_tower = merged.model, merged.lm_head, tower
    names = {"linear_1": model.projector.mlp[0], "linear_2": model.projector.mlp[2]}
    for name, layer in names.items():
        setattr(llava.model.multi_modal_projector, name, layer)
    llava.generation_config = merged.generation_config
    llava.to(merged.dtype).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=model.tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    ).save_pretrained(folder)


def _write_parts(model: Segmenter, folder: Path) -> None:
    """What `Segmenter.save` writes, with adapters that add nothing: theirs is in the merged weights."""
    model.save(folder)
    state = load_file(folder / "model.safetensors")
    zeroed = {name: torch.zeros_like(value) for name, value in state.items() if "lora_B" in name}
    save_file(state | zeroed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model"]["language"]["name"] = ".."
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _clip(visual: Any, size: int) -> Any:
    """open_clip's ViT, cut after the last level, as transformers' CLIPVisionModel."""
    from transformers import AutoModel, CLIPVisionConfig

    first = visual.transformer.resblocks[0]
    tower = AutoModel.from_config(
        CLIPVisionConfig(
            hidden_size=visual.conv1.out_channels,
            intermediate_size=first.mlp.c_fc.out_features,
            num_hidden_layers=len(visual.transformer.resblocks),
            num_attention_heads=first.attn.num_heads,
            image_size=size,
            patch_size=visual.conv1.kernel_size[0],
            hidden_act="gelu" if isinstance(first.mlp.gelu, nn.GELU) else "quick_gelu",
            layer_norm_eps=visual.ln_pre.eps,
        )
    )
    report = tower.load_state_dict(_clip_names(visual.state_dict()), strict=False)
    behind = {"post_layernorm.weight", "post_layernorm.bias"}  # after the features, and cut off
    if report.unexpected_keys or set(report.missing_keys) - behind:
        raise ModelError(f"the tower has other weights than CLIP: {report}")
    return tower


def _clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.": "embeddings.patch_embedding.",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.": "pre_layrnorm.",
        "transformer.resblocks.": "encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        ".attn.": ".self_attn.",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        elif name != "proj":  # CLIP's map into the space of texts
            found[name] = value
    return found
