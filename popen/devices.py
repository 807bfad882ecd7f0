"""Several processes, one a device: how a stage becomes them, and what they tell each other.

`POPEN_DEVICES=8 dvc repro` makes each stage that can use them start itself again under `torchrun`, which
tells every process its place in `RANK`, `LOCAL_RANK` and `WORLD_SIZE`; `accelerate launch` sets the same.
The number is no parameter, since no result depends on it (but for the order in which sums are rounded).

Light to import: every stage reads this file, torch is only loaded where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ASKED = "POPEN_DEVICES"
SHARD = "POPEN_SHARD"
_STAGES = "popen.stages."


class DevicesError(ValueError):
    """The devices cannot be used as asked; the message says what to change."""


def count() -> int:
    """Processes of this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def sharded() -> bool:
    """Whether training spreads its model over the processes (`popen.sharding`); one has nobody to share it
    with."""
    return os.environ.get(SHARD, "0") == "1" and count() > 1


def is_main() -> bool:
    """Whether this process writes the files and records: the only one, or the first."""
    return rank() == 0


def pair(images: int) -> int:
    """Processes for a long training of a small model with `images` a step, where nobody asks for a number:
    two on a CPU that has the cores. They wait for each other a few times a step, threads in every operation.
    """
    import torch

    return 1 if torch.cuda.is_available() or _available() < 2 or images % 2 else 2


def _available() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def relaunch(usual: Callable[[], int] = lambda: 1) -> None:
    """Become `POPEN_DEVICES` processes, or else `usual`, of the stage that was started with `python -m`;
    returns where that is done already, or one is enough. Raises DevicesError for what is not a number."""
    spec = sys.modules["__main__"].__spec__
    if "RANK" in os.environ or spec is None or not spec.name.startswith(_STAGES):
        return
    asked = os.environ.get(ASKED) or str(usual())
    if not asked.isdigit() or not int(asked):
        raise DevicesError(f"{ASKED} is {asked!r}; give the number of devices, as {ASKED}=8")
    if int(asked) == 1:
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, _available() // int(asked)))
    # the same process goes on, so that who started it (DVC) still waits for it, and may stop it
    os.execv(sys.executable, [sys.executable, "-m", "popen.launch", asked, spec.name, *sys.argv[1:]])


def device() -> torch.device:
    """This process's device: its GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def cores() -> int:
    """Processes that forward passes of small models may be spread over on this machine: its cores (or
    OMP_NUM_THREADS), for a stage that is one process without a GPU. Each then computes in one thread. Call it
    before anything is computed: a thread of OpenMP does not survive the fork."""
    import torch

    if count() > 1 or torch.cuda.is_available():
        return 1
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    return found


def halves() -> bool:
    """Whether this process's device multiplies bfloat16 fast. Where it must be emulated, it is many times
    slower than float32."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def autocast(wanted: bool) -> AbstractContextManager[object]:
    """Forward passes in bfloat16 where that is wanted and fast."""
    import torch

    return torch.autocast(device().type, torch.bfloat16) if wanted and halves() else nullcontext()


def as_read(states: Tensor) -> Tensor:
    """What a norm gives, in autocast's type: each of its readers would cast it anew."""
    import torch

    kind = states.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # `meta` knows no autocast
        return states
    return states.to(torch.get_autocast_dtype(kind))


def grouped() -> bool:
    """Whether this process trains together with others."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share(count: Tensor | int) -> Tensor | float:
    """What to multiply a mean over `count` of this process's things by, so that the mean of that over the
    processes is the mean over the things of all: n x count / (sum of the counts). 1.0 for one process.

    DDP averages gradients, but each process has another number of answer tokens and targets. All processes
    must call this as often, also those that have nothing to count.
    """
    if not grouped():
        return 1.0
    import torch
    import torch.distributed as dist

    own = torch.as_tensor(count, dtype=torch.float64).to(device_of_group())
    total = own.clone()
    dist.all_reduce(total)
    return (dist.get_world_size() * own / total.clamp(min=1)).float()


def means(parts: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
    """Figures of this process -> their means over all of them; a name that a process lacks counts as 0
    there, which is what `share` makes of a mean over nothing."""
    if not grouped():
        return dict(parts)
    import torch
    import torch.distributed as dist

    told: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(told, {name: float(value) for name, value in parts.items()})
    names = dict.fromkeys(name for one in told for name in one)
    return {name: torch.tensor(sum(one.get(name, 0.0) for one in told) / len(told)) for name in names}


def wait() -> None:
    """Until all processes of the group have come here."""
    if grouped():
        import torch.distributed as dist

        dist.barrier()


def leave() -> None:
    """End the group, where one was made; the stage is over."""
    if "torch" in sys.modules and grouped():
        import torch.distributed as dist

        dist.destroy_process_group()


def device_of_group() -> torch.device:
    """Where tensors must lie that the group's processes exchange."""
    import torch
    import torch.distributed as dist

    return device() if dist.get_backend() == "nccl" else torch.device("cpu")
