"""Several processes that train one model: `accelerate launch --num_processes N -m solon sft|reward-model|ppo …`.

Every process holds the model (or, with `--use_fsdp`, its shard of the model: models/sharding.py) and the same data, and draws
the same random numbers. A process works on its part of each batch, and gradients are summed before an optimiser step. A loss
is divided by the size of the whole batch, so the step is the one that a single process would make. In a single process, no
function here changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, and the command line calls these functions first
    import torch
    from torch import Tensor

T = TypeVar("T")
FSDP = "SOLON_FSDP"  # an environment variable: the launcher was asked for FSDP


def _group() -> Any:
    """The module torch.distributed, after this process has joined the other ones; None in a single process."""
    # Solon shards the frozen blocks. With this variable, transformers and accelerate would shard them too.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ[FSDP] = "1"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ:
        return None
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        from accelerate import PartialState

        # The other processes wait while the main process asks a judge or writes a model.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=4))
    return dist


def world_size() -> int:
    """How many processes train together; 1 for a single process."""
    dist = _group()
    return dist.get_world_size() if dist else 1


def rank() -> int:
    """The number of this process, 0..world_size() - 1."""
    dist = _group()
    return dist.get_rank() if dist else 0


def is_main() -> bool:
    """Whether this process writes files and speaks to the user: the process of rank 0."""
    return rank() == 0


def is_sharded() -> bool:
    """Whether the blocks of the model are sharded over the processes (`accelerate launch --use_fsdp`)."""
    return _group() is not None and FSDP in os.environ


def synchronised_steps(parts: Sequence[T], filler: T, together: bool) -> list[tuple[T, bool]]:
    """The parts that this process passes through the model, each with whether it counts.

    together: every forward pass needs all processes, as with a sharded model. A process with fewer parts than another one
    then passes `filler` through the model for the missing parts, and `filler` does not count.
    """
    steps = max(all_gather([len(parts)], world_size())) if together else len(parts)
    return [(part, True) for part in parts] + [(filler, False)] * (steps - len(parts))


def local_indices(n: int) -> range:
    """The indices, out of range(n), of the items that this process works on."""
    return range(rank(), n, world_size())


def barrier() -> None:
    """Wait until every process has reached this line."""
    if dist := _group():
        dist.barrier()


def broadcast(value: T) -> T:
    """The value that the main process has."""
    values = [value]
    if dist := _group():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the processes, written into x."""
    if dist := _group():
        dist.all_reduce(x)
    return x


def all_reduce_number(x: float) -> float:
    """The sum of a number over the processes."""
    if not _group():
        return x
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"  # NCCL sums tensors on a GPU only
    return all_reduce(torch.tensor(x, dtype=torch.float64, device=device)).item()


def all_gather(items: Sequence[T], n: int) -> list[T]:
    """All n results in order; each process gives the results of its `local_indices(n)`."""
    dist = _group()
    if not dist:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [parts[i % world_size()][i // world_size()] for i in range(n)]


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients. A parameter without a gradient counts as zeros."""
    dist = _group()
    if not dist:
        return
    import torch

    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))
