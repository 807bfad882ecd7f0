"""Tokenizer and language model: our own, any by folder, and with adapters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from popen.errors import ModelError
from popen.model.batches import Row
from popen.model.language import load_tokenizer, train_tokenizer
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.samples import Sample
from tests.conftest import CATEGORIES, WEIGHTS, mini_params
from tests.model.test_segmenter import rows

CORPUS = ["What could I drink from? It is the cup and the fork."] * 3
TOKENIZER = train_tokenizer(CORPUS, 300)


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_learns_the_corpus_and_obeys_its_size() -> None:
    known = TOKENIZER.encode(CORPUS[0], add_special_tokens=False)
    assert len(known) < len(CORPUS[0]) / 3
    assert len(TOKENIZER) <= 300
    assert len({TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id}) == 3
    assert train_tokenizer(CORPUS, 300).get_vocab() == TOKENIZER.get_vocab()


def with_language(**changes: object) -> Segmenter:
    params = mini_params()
    language = params.language.model_copy(update=changes)
    named = params.language.name if "name" not in changes else str(changes["name"])
    tokenizer = copy.deepcopy(TOKENIZER) if named == "custom" else load_tokenizer(named)
    torch.manual_seed(0)
    return Segmenter(params.model_copy(update={"language": language}), tokenizer, CATEGORIES)


def test_norms_give_what_is_read_and_change_nothing() -> None:
    """In bfloat16 our language model says, bit for bit, what transformers' own says with the same weights."""
    ours = with_language().causal
    plain = LlamaForCausalLM(ours.config)
    plain.load_state_dict(ours.state_dict())
    ids = torch.arange(4, 20)[None]
    read: dict[str, torch.dtype] = {}
    query = ours.model.layers[0].self_attn.q_proj
    query.register_forward_pre_hook(lambda _, given: read.update(dtype=given[0].dtype))
    assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert read["dtype"] == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert read["dtype"] == torch.bfloat16


def step(model: Segmenter, picture: Image.Image, sample: Sample) -> set[str]:
    """One step of training; returns the names of the parameters that moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = model.encoder.batch([picture], rows(sample))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first moves LoRA's B alone, for A's gradient passes through it
        sft_loss(model(batch), batch, WEIGHTS)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}


def same(first: Segmenter, second: Segmenter, picture: Image.Image, sample: Sample) -> None:
    batch = first.encoder.batch([picture], rows(sample))
    one, other = first.eval()(batch), second.eval()(batch)
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.masks, other.masks)


def test_lora_trains_its_adapters_and_the_codebooks_rows_alone(
    picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    model = with_language(lora_r=2)
    moved = {name for name in step(model, picture, sample) if name.startswith("language.")}
    assert {name.split(".")[-3] for name in moved if "lora_" in name} == {"lora_A", "lora_B"}
    assert {name.split(".")[-4] for name in moved if "lora_" in name} == {"q_proj", "v_proj"}
    assert len([name for name in moved if "lora_" in name]) == 2 * 2 * 2  # A and B, two targets, two layers
    rows_of = [name for name in moved if "lora_" not in name]
    assert [name.split(".")[-4] for name in rows_of] == ["embed_tokens"]  # tied: those of the head are these
    assert dict(model.named_parameters())[rows_of[0]].shape == (4, 32)  # S x K rows
    model.save(tmp_path)
    same(model, Segmenter.load(tmp_path), picture, sample)


def test_adapters_of_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^model\.language\.lora_targets: \['query'\] are not layers of custom"
    ):
        with_language(lora_r=2, lora_targets=["query"])


def test_without_lora_all_of_it_trains(picture: Image.Image, sample: Sample) -> None:
    model = with_language()
    language = {name for name, _ in model.named_parameters() if name.startswith("language.")}
    assert language <= step(model, picture, sample)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A language model as one finds it: a folder with weights and a tokenizer without padding token."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER) + 3,  # published vocabularies are often padded
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_by_folder_brings_its_weights(
    llama: Path, picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    model = with_language(name=str(llama), lora_r=2)
    base = LlamaForCausalLM.from_pretrained(llama)
    mine, theirs = model.language.get_input_embeddings().weight, base.model.embed_tokens.weight
    assert len(mine) == len(TOKENIZER) + 5 == len(model.tokenizer)  # an image token and S x K = 4 others
    torch.testing.assert_close(mine[: len(TOKENIZER)], theirs[: len(TOKENIZER)])
    gate = "model.layers.1.mlp.gate_proj.weight"
    torch.testing.assert_close(model.causal.state_dict()[gate], base.state_dict()[gate])

    moved = {name for name in step(model, picture, sample) if name.startswith("language.")}
    assert {n.split(".")[-4] for n in moved if "lora_" not in n} == {"embed_tokens", "lm_head"}
    model.save(tmp_path / "saved")
    kept = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name for name in kept if name.startswith("language.")} == moved  # not the base model's weights
    same(model, Segmenter.load(tmp_path / "saved"), picture, sample)


def test_other_architectures_have_other_names_inside(
    picture: Image.Image, sample: Sample, tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=len(TOKENIZER), n_positions=128, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    model = with_language(name=str(tmp_path / "gpt2")).eval()
    output = model(model.encoder.batch([picture], rows(sample)))
    assert output.logits.shape[1] == len(model.tokenizer)
    assert output.masks.shape == (3, 32, 32)
    batch = model.encoder.batch([picture], [Row(0, "What?", "It is the cup {seg}.", rows(sample)[1].masks)])
    sft_loss(model(batch), batch, WEIGHTS)[0].backward()
    assert model.causal.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
