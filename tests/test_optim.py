"""Which optimiser trains which weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from popen import devices
from popen.optim import Muon32, optimizers, orthogonal
from popen.params import TrainParams


class Tied(nn.Module):
    """A head tied to its embedding, a frozen layer, a convolution and one ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.conv = nn.Conv2d(1, 1, 3)


def params(**changes: Any) -> TrainParams:
    base = {"steps": 1, "images": 1, "accumulate": 1, "lr": 0.1, "muon": 0.0, "warmup": 0.0}
    base |= {"weight_decay": 0.5, "clip": 1.0, "checkpoint_every": 1, "eval_every": 1}
    return TrainParams.model_validate(base | changes)


def test_adamw_takes_everything_that_trains_and_does_not_decay_vectors() -> None:
    model = Tied()
    (adamw,) = optimizers(model, params())
    decayed, others = adamw.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in decayed["params"]} == {
        id(w) for w in (model.embed.weight, model.layer.weight, model.conv.weight)
    }
    assert {id(p) for p in others["params"]} == {id(model.layer.bias), id(model.conv.bias)}


def test_the_slow_part_is_adamws_at_its_share_of_the_rate() -> None:
    model = Tied()
    (adamw,) = optimizers(model, params(muon=0.02), (model.layer, 0.25))  # Muon is left no matrix
    assert [(group["lr"], group["weight_decay"]) for group in adamw.param_groups] == [
        (0.1, 0.5),
        (0.1, 0.0),
        (0.025, 0.5),
        (0.025, 0.0),
    ]
    late = [id(p) for group in adamw.param_groups[2:] for p in group["params"]]
    assert late == [id(model.layer.weight), id(model.layer.bias)]
    everything = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_muon_takes_matrices_between_layers_alone_and_leaves_the_rest_to_adamw() -> None:
    model = Tied()
    adamw, muon = optimizers(model, params(muon=0.02))
    assert isinstance(muon, torch.optim.Muon)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model.layer.weight)]
    assert muon.param_groups[0]["lr"] == 0.02
    assert muon.param_groups[0]["weight_decay"] == 0.5
    left = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert id(model.layer.weight) not in left
    assert id(model.embed.weight) in left


def test_muon_takes_neither_a_head_nor_lora() -> None:
    """Of a language model that is named: its head is tied to nothing, its blocks train through adapters."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    language = LlamaForCausalLM(config)
    assert language.lm_head.weight is not language.model.embed_tokens.weight
    _, muon = optimizers(language, params(muon=0.02))
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    blocks = [p for n, p in language.named_parameters() if n.endswith("proj.weight")]
    assert taken == {id(p) for p in blocks}
    adapted = get_peft_model(language, LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(optimizers(adapted, params(muon=0.02))) == 1


SHAPES = [(6, 9), (9, 6), (6, 9), (5, 5)]


def moved(kind: type[torch.optim.Muon]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momenta behind three steps."""
    noise = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]
    muon = kind(weights, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for weight in weights:
            weight.grad = (weight * (step + 1)).detach().sin()
        muon.step()
    state = muon.state_dict()["state"]
    return [weight.detach() for weight in weights], [state[n]["momentum_buffer"] for n in range(len(weights))]


def test_in_float32_muon_makes_torchs_steps() -> None:
    # three steps of rate 0.1 move a weight by up to 0.2; bfloat16 has three digits
    torch.testing.assert_close(moved(Muon32), moved(torch.optim.Muon), rtol=0, atol=0.01)


def test_muon_is_in_float32_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for halves, kind in ((False, Muon32), (True, torch.optim.Muon)):
        monkeypatch.setattr(devices, "halves", lambda halves=halves: halves)
        assert type(optimizers(Tied(), params(muon=0.02))[1]) is kind


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 30, 12), (2, 12, 30)])
def test_what_is_orthogonal_keeps_directions_and_has_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = orthogonal(matrices, (3.4445, -4.7750, 2.0315), 5)
    assert made.shape == shape
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    along = left.mT @ made @ right.mT  # in the matrices' own directions: a diagonal
    values = along.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(along, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert values.min() > 0.5
    assert values.max() < 1.3
