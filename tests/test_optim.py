"""Which optimiser trains which weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from popen.optim import optimizers
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
    base = {"steps": 1, "images": 1, "questions": 1, "accumulate": 1, "lr": 0.1, "muon": 0.0, "warmup": 0.0}
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
