"""Language model and tokenizer: a small Llama of our own, or any causal LM by name or folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    """A saved or published tokenizer, padded on the left (generation continues at the right end)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder_or_name), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_language(params: LanguageParams, vocabulary: int, eos: int, pad: int, pretrained: bool) -> Any:
    """The causal LM with room for `vocabulary` tokens, LoRA adapters added where `lora_r` > 0.

    `pretrained` loads a named LM's weights; without it only its config is read (the caller loads
    a saved state). Rows of the embedding that are new start at the mean of the old ones.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    if params.name == "custom":
        config: Any = AutoConfig.for_model(
            "llama",
            vocab_size=vocabulary,
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
            attn_implementation="sdpa",
        )
        language: Any = LlamaForCausalLM(config)
    elif pretrained:
        language = AutoModelForCausalLM.from_pretrained(params.name, dtype="auto", attn_implementation="sdpa")
    else:
        config = AutoConfig.from_pretrained(params.name)
        language = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if language.get_input_embeddings().num_embeddings != vocabulary:
        language.resize_token_embeddings(vocabulary, mean_resizing=pretrained)
    language.generation_config.eos_token_id = eos
    language.generation_config.pad_token_id = pad
    if params.lora_r:
        from peft import LoraConfig, get_peft_model  # 7 s of imports: only where LoRA is asked for

        language = get_peft_model(
            language,
            LoraConfig(
                r=params.lora_r,
                lora_alpha=params.lora_alpha,
                target_modules=params.lora_targets,
                task_type="CAUSAL_LM",
            ),
        )
        # the codebook's rows are new: embedding and head train in full
        language.get_input_embeddings().weight.requires_grad_(True)
        language.get_output_embeddings().weight.requires_grad_(True)
    return language
