"""Published weights: a causal LM or LLaVA-1.5 by hub name or folder, with every weight accounted for.

LLaVA-1.5 is read in the layout of `llava-hf/llava-1.5-7b-hf` (`LlavaForConditionalGeneration`: sharded
safetensors, old or new key names). Its language model and its projector are taken; the vision tower is
open_clip's, so that position embeddings can be interpolated to another image size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popen.errors import ModelError, flat
from popen.params import VisionParams


def read_config(name: str) -> Any:
    """The config of a hub name or folder. Raises ModelError where there is none that transformers knows."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{name}: no usable config.json ({flat(error)}); {_REMEDY}") from error


def text_config(config: Any) -> Any:
    """The config of the language model inside, which for a plain causal LM is the config itself."""
    return config.get_text_config()


def load_published(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor] | None]:
    """Read the weights. Returns the causal LM, and LLaVA's projector as the state of ours (else None).

    Raises ModelError for a missing or broken file, and for weights that have no place in the model or are
    not in the files: a model that is random in parts answers all the same, only badly.
    """
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    config = read_config(name)
    llava = config.model_type == "llava"
    kind: Any = LlavaForConditionalGeneration if llava else AutoModelForCausalLM
    try:
        model, report = kind.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except Exception as error:  # of transformers, safetensors, torch or the file system
        broken = [path.name for path in sorted(Path(name).glob("*.safetensors")) if not _opens(path)]
        which = f" of {', '.join(broken)}" if broken else ""
        raise ModelError(f"{name}: the weights{which} cannot be read ({flat(error)}); {_REMEDY}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, report[what])):
            some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            words = what.replace("_", " ")
            raise ModelError(f"{name}: its weights do not fit its config.json, {words}: {some}; {_REMEDY}")
    if not llava:
        return model, None
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(
            text_config(config), dtype=dtype, attn_implementation="sdpa"
        )
    language.model, language.lm_head = model.model.language_model, model.lm_head
    state = model.model.multi_modal_projector.state_dict()
    names = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
    return language, {
        f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value.float() for key, value in state.items()
    }


def _opens(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def check_llava(config: Any, vision: VisionParams, width: int, image_id: int) -> None:
    """Whether LLaVA's projector sees what it was trained on: `width` features of the same block, in order.

    Raises ModelError that names the parameter which does not fit.
    """
    layers, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ModelError("this LLaVA has another projector than LLaVA-1.5 (two layers with GELU and biases)")
    if not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise ModelError("this LLaVA takes other image features than LLaVA-1.5 (one layer, no class)")
    block = layer + layers if layer < 0 else layer - 1  # layer 0 is the embedding, -1 the last block
    if vision.levels[0] != block:
        raise ModelError(
            f"model.vision.levels must begin with {block}, not {vision.levels[0]}: "
            "LLaVA's projector was trained on that block's features"
        )
    if vision.shuffle != 1 or width != config.vision_config.hidden_size:
        raise ModelError(
            f"LLaVA's projector takes {config.vision_config.hidden_size} features of one place, the tower "
            f"gives {width} x {vision.shuffle**2}: set model.vision.shuffle to 1 and model.vision.name to "
            "LLaVA's tower (ViT-L-14-336)"
        )
    if image_id != config.image_token_index:
        raise ModelError(
            f"the tokenizer's <image> is token {image_id}, config.json says {config.image_token_index}: "
            "this is another model's tokenizer"
        )


_REMEDY = "get the whole folder again, or name another one in model.language.name"
