"""A model whose weights, gradients and moments are spread over the devices (torch's FSDP2, `fully_shard`).

`POPEN_SHARD=1` asks for it, for models that do not fit each device. Checkpoints still hold plain tensors, so
that any number of processes can go on from them, sharded or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from popen import devices


def shard(model: nn.Module) -> None:
    """Shard in place, the layers that `transformers` says are units each for themselves. Its parameters are
    new objects afterwards: make the optimisers behind this."""
    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module)
    fully_shard(model, ignored_params=set(_scalars(model)))
    for scalar in _scalars(model):
        scalar.data = scalar.data.to(devices.device())  # which FSDP2 does with the others alone


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that FSDP2 does not take, for nothing of them can be spread."""
    return [p for p in model.parameters() if p.ndim == 0]


def reduce_scalars(model: nn.Module) -> None:
    """Average the gradients that FSDP2 does not see. Call it behind the last backward of a step."""
    for parameter in _scalars(model):
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def reached(model: nn.Module) -> Tensor:
    """Zero, with a gradient of zero for the parameters outside those layers: processes whose losses reach
    different ones (one has no target) would otherwise reduce gradients of different sizes."""
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    return sum((p.reshape(-1)[0] * 0.0 for p in whole), torch.zeros(()))


def plain(value: Any) -> Any:
    """A state with every sharded tensor made whole, on the CPU of the main process; in the others, which save
    nothing, those with axes are empty. All processes must call this."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if devices.is_main() or not whole.ndim else torch.empty(0)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state as plain tensors, those that are tied once. All processes must call this."""
    every, once = ({n for n, _ in model.named_parameters(remove_duplicate=tied)} for tied in (False, True))
    return plain({name: value for name, value in model.state_dict().items() if name not in every - once})


def load_weights(model: nn.Module, file: Path) -> None:
    """Read plain tensors (safetensors) into a sharded model."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in load_file(file).items():
            own[name].copy_(_like(own[name], value))


def plain_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser of sharded parameters give, and take, a state of plain tensors."""
    for group in optimizer.param_groups:
        group["foreach"] = False  # a group may hold scalars, which are plain, beside what is spread

    def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            number: {
                name: _like(params[number], value) if value.shape == params[number].shape else value
                for name, value in kept.items()
            }
            for number, kept in state["state"].items()
        }
        return state | {"state": moments}

    optimizer.register_state_dict_post_hook(lambda _, state: plain(state))
    optimizer.register_load_state_dict_pre_hook(take)


def gather(model: nn.Module) -> None:
    """Make the main process's model whole again, on the CPU; the other processes' is of no use then."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without a backward has left weights gathered
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in done:
                done[id(parameter)] = nn.Parameter(plain(parameter.data), parameter.requires_grad)
            module._parameters[name] = done[id(parameter)]


def _like(target: Tensor, value: Tensor) -> Tensor:
    """The part of a plain tensor that this process has of `target`."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(
        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
