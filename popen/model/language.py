"""Language model and tokenizer: a small Llama of our own, or any causal LM or LLaVA-1.5 by name or folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popen import devices
from popen.errors import ModelError, flat
from popen.model.published import load_published, read_config, text_config
from popen.params import LanguageParams

IMAGE = "<image>"
# LLaVA-1.5's conversation; the image tokens stand where `<image>` is.
PROMPT = "USER: <image>\n{question} ASSISTANT:"


def train_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` entries, special tokens apart, made from the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def load_tokenizer(folder_or_name: str | Path) -> Any:
    """A saved or published tokenizer, padded on the left (generation continues at the right end).

    Raises ModelError where there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder_or_name), padding_side="left")
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            f"{folder_or_name}: no usable tokenizer ({flat(error)}); get the whole folder again"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_language(
    params: LanguageParams, tokenizer: Any, new: Sequence[int], pretrained: bool
) -> tuple[Any, dict[str, Tensor] | None]:
    """The causal LM with a row for each token of `tokenizer`, and LLaVA's projector where it brings one.

    Args:
        new: ids of the codebook tokens, the last ones of the tokenizer. They start at the mean of the other
            rows, which stay as they are, bit for bit.
        pretrained: load a named LM's weights; without it only its config is read.

    Where `lora_r` > 0 adapters and the new rows of embedding and head train, in float32; the rest is frozen.
    Raises ModelError for weights that cannot be used, or that are not this tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    # what trains is float32, or AdamW's small steps would be rounded away
    dtype = getattr(torch, params.dtype) if params.lora_r else torch.float32
    eos, pad, projector = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    if params.name == "custom":
        config: Any = AutoConfig.for_model(
            "llama",
            vocab_size=len(tokenizer),
            hidden_size=params.width,
            intermediate_size=params.intermediate,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            max_position_embeddings=params.max_length,
            # 0.02 is made for wide models: at this width attention would start uniform and stay so for long
            initializer_range=params.width**-0.5,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=pad,
            tie_word_embeddings=True,
            # as fast as "sdpa" and in bfloat16 on a CPU a tenth of a training step faster
            attn_implementation="eager",
        )
        language: Any = LlamaForCausalLM(config)
        for layer in language.model.layers:
            layer.input_layernorm.register_forward_hook(_in_its_readers_type)
            layer.post_attention_layernorm.register_forward_hook(_in_its_readers_type)
    else:
        if pretrained:
            language, projector = load_published(params.name, dtype)
        else:
            config = text_config(read_config(params.name))
            language = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        _make_room(language, len(tokenizer), new, params.name)
    language.generation_config.eos_token_id = eos
    language.generation_config.pad_token_id = pad
    if params.lora_r:
        language = _with_adapters(language, params, new)
    if params.checkpointing:
        language.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return language, projector


def _in_its_readers_type(_: Any, __: Any, states: Tensor) -> Tensor:
    """What a norm gives; each of the linear layers behind it would cast it anew."""
    return devices.as_read(states)


def _make_room(language: Any, size: int, new: Sequence[int], name: str) -> None:
    """Give embedding and head `size` rows; published ones often have more than their tokenizer has tokens."""
    rows, known = language.get_input_embeddings().num_embeddings, new[0]
    if known - 1 > rows:  # one less: <image> may be ours, too
        raise ModelError(
            f"{name}: {known} tokens for weights of {rows} rows: this is another model's tokenizer"
        )
    if rows != size:
        language.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for part in (language.get_input_embeddings(), language.get_output_embeddings()):
            part.weight[list(new)] = part.weight[: min(known, rows)].float().mean(0).to(part.weight.dtype)


def _with_adapters(language: Any, params: LanguageParams, new: Sequence[int]) -> Any:
    from peft import LoraConfig, get_peft_model  # 7 s of imports: only where LoRA is asked for

    ends = (language.get_input_embeddings(), language.get_output_embeddings())
    names = [name for name, module in language.named_modules() if any(module is end for end in ends)]
    config = LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        target_modules=params.lora_targets,
        trainable_token_indices={name: list(new) for name in names},
        task_type="CAUSAL_LM",
    )
    try:
        language = get_peft_model(language, config)
    except ValueError as error:
        raise ModelError(
            f"model.language.lora_targets: {params.lora_targets} are not layers of {params.name} "
            f"({flat(error)})"
        ) from error
    for parameter in language.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return language
