"""`popen plan`: counts against the published ones, bytes against arithmetic by hand and a real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from popen.cli import app
from popen.footprint import (
    GB,
    Devices,
    Memory,
    block_bytes,
    held,
    language_bytes,
    memory,
    on_meta,
    parts,
    saved_bytes,
)
from popen.model.language import _with_adapters, load_tokenizer
from popen.model.losses import sft_loss
from popen.model.segmenter import Segmenter
from popen.params import ParamsError, compose
from popen.samples import Sample
from tests.conftest import CATEGORIES, WEIGHTS, mini_params
from tests.model.llava import llava_params, write_llava, write_tower
from tests.model.test_segmenter import rows

CONF = Path(__file__).parents[1] / "conf"
# Llama's and Vicuna's own counts, with the 32,000 rows that they were trained with
PUBLISHED = {"llava-7b": 6_738_415_616, "llava-13b": 13_015_864_320}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    params = compose(CONF, [f"model={name}"]).model
    found = parts(on_meta(params))
    d, r = params.language.width, params.language.lora_r
    rows_more = 2 + 6  # LLaVA's <image> and <pad>, and the codebook, in embedding and head
    assert found["language"] == (PUBLISHED[name] + 2 * rows_more * d, 0)
    assert found["LoRA"] == (params.language.layers * 2 * r * 2 * d,) * 2
    assert found["codebook rows"] == (2 * 6 * d,) * 2
    assert found["projector"] == (1024 * d + d + d * d + d,) * 2
    with torch.device("meta"):
        whole = open_clip.create_model("ViT-L-14-336", device="meta").visual
    count = sum(p.numel() for p in whole.parameters())
    assert round(count / 1e6) == 304
    beyond = [whole.ln_post.weight, whole.ln_post.bias, whole.proj]  # behind the last level
    beyond += whole.transformer.resblocks[23].parameters()
    places = ((448 // 14) ** 2 - (336 // 14) ** 2) * 1024  # of the larger image
    assert found["tower"] == (count - sum(p.numel() for p in beyond) + places, 0)
    trains = {part for part, (_, trained) in found.items() if trained}
    assert trains == found.keys() - {"tower", "language"}


def test_bytes_are_those_of_a_real_model(picture: Image.Image, sample: Sample, tmp_path: Path) -> None:
    """Weights, gradients and moments, after a step of training in bfloat16 under LoRA."""
    (tmp_path / "llava").mkdir()
    llava = write_llava(tmp_path / "llava")
    params = llava_params(tmp_path / "llava", write_tower(llava, tmp_path), dtype="bfloat16")
    model = Segmenter(params, load_tokenizer(tmp_path / "llava"), CATEGORIES).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    weights = WEIGHTS.model_copy(update={"dense": 0.1, "describe": 0.1, "point": 0.1, "inventory": 0.1})
    named = [replace(row, kinds=["cup", "fork"][: (row.answer or "").count("{seg}")]) for row in rows(sample)]
    batch = model.encoder.batch([picture], named, [sample])
    for _ in range(2):
        sft_loss(model(batch), batch, weights)[0].backward()
        optimizer.step()
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()
    }
    weights_held, gradients, moments = held(model)
    assert gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert moments == sum(state.nbytes for state in states)
    assert abs(weights_held - sum(stored.values())) < 0.01 * weights_held  # buffers that no file keeps


def _kept(layers: int, width: int, intermediate: int, checkpointing: bool) -> int:
    """What a real Llama under LoRA keeps for 2 x 40 tokens, in bfloat16."""
    language = mini_params().language.model_copy(update={"lora_r": 2})
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    model = _with_adapters(LlamaForCausalLM(config).bfloat16(), language, [62, 63]).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    embeds = torch.randn(2, 40, width, dtype=torch.bfloat16, requires_grad=True)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden: torch.Tensor = (
                model.get_base_model().model(inputs_embeds=embeds, use_cache=False).last_hidden_state
            )
        return hidden

    return saved_bytes(run, model)


@pytest.mark.parametrize(("width", "intermediate"), [(64, 64), (64, 256), (128, 64)])
def test_a_block_keeps_what_the_formula_says(width: int, intermediate: int) -> None:
    language = mini_params().language.model_copy(update={"width": width, "intermediate": intermediate})
    a_block = (_kept(3, width, intermediate, False) - _kept(2, width, intermediate, False)) / 80
    assert a_block == pytest.approx(block_bytes(language), rel=0.06)
    inputs = (_kept(3, width, intermediate, True) - _kept(2, width, intermediate, True)) / 80
    assert inputs == 2 * width


def test_formulas_by_hand() -> None:
    language = mini_params().language  # D 32, F 64, V 300, two layers, two LoRA targets
    assert block_bytes(language) == 8 * 32 + 8 * 32 + 2 * 2 * 32 + 6 * 64 == 1024
    assert language_bytes(language, 100, 7) == 100 * 2 * 1024 + 7 * 10 * 300
    again = language.model_copy(update={"checkpointing": True})
    assert language_bytes(again, 100, 7) == 100 * (2 * 2 * 32 + 1024) + 7 * 10 * 300
    assert Memory(1, 2, 3, 4).total == 10

    layer = torch.nn.Linear(5, 3)  # 18 weights of 4 bytes
    layer.bias.requires_grad_(False)
    assert held(layer) == (72, 60, 120)
    x = torch.randn(7, 5, requires_grad=True)
    assert saved_bytes(lambda: layer(x).exp(), layer) == 7 * 5 * 4 + 7 * 3 * 4  # the input and exp's result


def test_devices_share_what_is_sharded() -> None:
    model = on_meta(mini_params())
    alone, ddp, fsdp = (memory(model, Devices(n, 80, s), 2) for n, s in ((1, False), (8, False), (8, True)))
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (
        alone.weights,
        2 * alone.gradients,
        alone.optimizer,
    )
    # float32; of a block the attention, the three parts of the MLP and two norms, of D 32 and F 64
    block = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    named = [*model.named_parameters(), *model.named_buffers()]
    outside = sum(t.nbytes for name, t in named if ".layers." not in name)
    assert outside == alone.weights - 2 * block
    assert fsdp.weights == alone.weights // 8 + outside + 2 * block
    trained = sum(p.nbytes for n, p in model.named_parameters() if ".layers." not in n and p.requires_grad)
    assert trained
    assert fsdp.gradients == alone.gradients // 8 + trained
    assert fsdp.optimizer == alone.optimizer // 8
    assert alone.activations == ddp.activations == fsdp.activations
    assert memory(model, Devices(1, 80, False), 4).activations > 1.9 * alone.activations


def test_the_command_says_what_fits(recwarn: pytest.WarningsRecorder) -> None:
    small, large = (CliRunner().invoke(app, ["plan", "--model", name]).output for name in PUBLISHED)
    assert not [warning.message for warning in recwarn if warning.category is FutureWarning]
    lines = {line[:18].strip(): line[18:] for line in small.splitlines() if line}
    assert "no fit" not in lines["1 x 24 GB"]
    assert {"1 x 80 GB", "8 x 80 GB, DDP", "8 x 80 GB, FSDP"} <= lines.keys()
    sums = {name: float(line.split()[-1]) for name, line in lines.items() if name.startswith(("1 x", "8 x"))}
    assert 2 * 6.7e9 / GB < sums["1 x 24 GB"] < 0.9 * 24
    # one device takes all 32 images of a micro-batch, each of eight takes 4
    assert sums["8 x 80 GB, FSDP"] < sums["8 x 80 GB, DDP"] < sums["1 x 80 GB"]
    assert [int(lines[name].split()[0]) for name in ("1 x 80 GB", "8 x 80 GB, DDP")] == [32, 4]
    tight = next(line for line in large.splitlines() if line.startswith("1 x 24 GB"))
    assert "no fit" in tight


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ParamsError, match="llava-70b"):
        compose(CONF, ["model=llava-70b"])
