"""Optimisers: AdamW, and where parameters ask for it Muon for the matrices between a model's layers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from popen import devices
from popen.params import TrainParams

Slow = tuple[nn.Module, float]  # a part of the model, and its learning rate as a share of `params.lr`


def optimizers(
    model: nn.Module, params: TrainParams, slow: Slow | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay on vectors; with `params.muon`, Muon for the matrices it is made for.

    Muon takes weights of linear layers (see `_between_layers`); `params.muon` is its learning rate in
    AdamW's scale (updates are matched in RMS). A language model from scratch learns more a step with it
    (docs/experiments.md). AdamW takes all of the `slow` part, which knows its trade already.
    """
    part, share = slow or (nn.Module(), 1.0)
    late = {id(p) for p in part.parameters()}
    matrices = [w for w in _between_layers(model) if id(w) not in late] if params.muon else []
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = []
    for rate, members in (
        (params.lr, [p for p in rest if id(p) not in late]),
        (share * params.lr, [p for p in rest if id(p) in late]),
    ):
        arrays, vectors = [p for p in members if p.ndim > 1], [p for p in members if p.ndim <= 1]
        groups.append({"params": arrays, "weight_decay": params.weight_decay, "lr": rate})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr": rate})
    groups = [group for group in groups if group["params"]]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=params.lr, betas=(0.9, 0.95))]
    if matrices:
        muon = torch.optim.Muon if devices.halves() else Muon32
        found.append(
            muon(
                matrices,
                lr=params.muon,
                weight_decay=params.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return found


class Muon32(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024) multiplies in bfloat16; this one in float32, for a CPU that emulates
    bfloat16 and would take 25 times as long. Matrices of one shape go together, and learning rates are
    adjusted as by "match_rms_adamw".
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for shape, weights in alike.items():
                moved = torch.stack([self._moved(weight, group["momentum"]) for weight in weights])
                turns = orthogonal(moved, group["ns_coefficients"], group["ns_steps"])
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for weight, turn in zip(weights, turns, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(turn, alpha=-rate)

    def _moved(self, weight: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum, which it moves on."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(buffer, momentum)


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Matrices (n, rows, columns) -> about the nearest of which all singular values are 1 (Newton-Schulz).
    The coefficients' polynomial leaves the values between about 0.7 and 1.2."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


def deal(muon: torch.optim.Muon) -> None:
    """Deal the matrices out to the processes of the group: each makes the steps of its own, the costly part
    of Muon, and hands them to the others. The state that is saved is whole."""
    matrices = [w for group in muon.param_groups for w in group["params"]]
    largest_first = sorted(range(len(matrices)), key=lambda number: -matrices[number].numel())
    processes = dist.get_world_size()
    owner = {id(matrices[n]): place % processes for place, n in enumerate(largest_first)}

    def leave_to_others(*_: Any) -> None:
        for weight in matrices:
            if owner[id(weight)] != dist.get_rank():
                weight.grad = None  # Muon passes by what has no gradient

    def hand_out(tensors: dict[int, Tensor]) -> None:
        # what a process owns travels as one: 73 messages take nine times as long
        owners = range(min(processes, len(matrices)))
        owned = [[tensors[id(w)] for w in matrices if owner[id(w)] == rank] for rank in owners]
        packed = [torch.cat([one.flatten() for one in own]) for own in owned]
        waiting = [dist.broadcast(flat, rank, async_op=True) for rank, flat in enumerate(packed)]
        for one in filter(None, waiting):
            one.wait()
        for own, flat in zip(owned, packed, strict=True):
            for tensor, part in zip(own, flat.split([one.numel() for one in own]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def whole(*_: Any) -> None:
        hand_out({id(w): muon.state[w].setdefault("momentum_buffer", torch.zeros_like(w)) for w in matrices})

    muon.register_step_pre_hook(leave_to_others)
    muon.register_step_post_hook(lambda *_: hand_out({id(w): w.data for w in matrices}))
    muon.register_state_dict_pre_hook(whole)


def _between_layers(model: nn.Module) -> list[torch.Tensor]:
    """Weights of the linear layers that train, but for a language model's head, tied or not, and LoRA's."""
    modules = dict(model.named_modules())
    heads = [m.get_output_embeddings() for m in modules.values() if hasattr(m, "get_output_embeddings")]
    ends = [m for m in modules.values() if isinstance(m, nn.Embedding)] + heads
    left_out = {id(m.weight) for m in ends if m is not None}
    linear = [m.weight for name, m in modules.items() if isinstance(m, nn.Linear) and "lora_" not in name]
    return [w for w in linear if w.requires_grad and id(w) not in left_out]
