"""Several processes that train one model: `accelerate launch --num_processes N -m solon sft|reward-model|ppo …`.

Every process holds the model (or, with `--use_fsdp`, its share of it: models/sharding.py) and the same data, and draws the
same random numbers. Each process works on its part of a batch, and gradients are summed before a step. A loss is divided by
what the whole batch holds, not by the part, so the step is the one that a single process would take. In a single process
every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, and the command line asks here first
    import torch
    from torch import Tensor

T = TypeVar("T")
FSDP = "SOLON_FSDP"  # set where the launcher was asked for FSDP


def _joined() -> bool:
    """Whether there are other processes. The first call joins them."""
    # Solon shards the frozen blocks itself; transformers and accelerate would each do it again.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ[FSDP] = "1"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ:
        return False
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        from accelerate import PartialState

        # The other processes wait while the first one judges or writes a model.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=4))
    return True


def world_size() -> int:
    """How many processes train together; 1 for a single one."""
    if not _joined():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def rank() -> int:
    """The number of this process, 0..world_size() - 1."""
    if not _joined():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the user: the one of rank 0."""
    return rank() == 0


def is_sharded() -> bool:
    """Whether the blocks of the model are sharded over the processes (`accelerate launch --use_fsdp`)."""
    return _joined() and FSDP in os.environ


def synchronised_steps(parts: Sequence[T], filler: T, together: bool) -> list[tuple[T, bool]]:
    """The parts that this process passes through the model, each with whether it counts.

    together: every forward pass needs all processes, as it does where the model is sharded. Then a process that has fewer
    parts than another one passes `filler` through the model instead, which does not count.
    """
    most = max(all_gather([len(parts)], world_size())) if together else len(parts)
    return [(part, True) for part in parts] + [(filler, False)] * (most - len(parts))


def local_indices(n: int) -> range:
    """Which of n items this process works on."""
    return range(rank(), n, world_size())


def barrier() -> None:
    """Wait until every process has reached this line."""
    if _joined():
        import torch.distributed as dist

        dist.barrier()


def broadcast(value: T) -> T:
    """The value that the process of rank 0 has."""
    if not _joined():
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the processes, written into x."""
    if _joined():
        import torch.distributed as dist

        dist.all_reduce(x)
    return x


def all_reduce_number(x: float) -> float:
    """The sum of a number over the processes."""
    if not _joined():
        return x
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"  # nccl knows no other
    return all_reduce(torch.tensor(x, dtype=torch.float64, device=where)).item()


def all_gather(items: Sequence[T], n: int) -> list[T]:
    """All n results in order, where each process has those of its `local_indices(n)`."""
    if not _joined():
        return list(items)
    import torch.distributed as dist

    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [parts[i % world_size()][i // world_size()] for i in range(n)]


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients. A parameter without a gradient counts as zeros."""
    if not _joined():
        return
    import torch
    import torch.distributed as dist

    learned = [p for p in parameters if p.requires_grad]
    for p in learned:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in learned:
        assert p.grad is not None
        by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))
