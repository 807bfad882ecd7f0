"""Optimisers: AdamW, and where parameters ask for it Muon for the matrices between a model's layers."""

from __future__ import annotations

import torch
from torch import nn

from popen.params import TrainParams


def optimizers(model: nn.Module, params: TrainParams) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay on vectors; with `params.muon`, Muon for the matrices it is made for.

    Muon takes weights of linear layers, tied embeddings left out; `params.muon` is its learning rate in
    AdamW's scale (updates are matched in RMS). A language model from scratch learns more a step with it
    (docs/results.md).
    """
    matrices = _between_layers(model) if params.muon else []
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=params.lr, betas=(0.9, 0.95))]
    if matrices:
        found.append(
            torch.optim.Muon(
                matrices,
                lr=params.muon,
                weight_decay=params.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return found


def _between_layers(model: nn.Module) -> list[torch.Tensor]:
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return [w for w in linear if w.requires_grad and id(w) not in embedded]
