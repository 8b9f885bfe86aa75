"""Several processes that train one model: `accelerate launch --num_processes N -m solon sft|reward-model|ppo …`.

Every process holds the model (or, with `--use_fsdp`, its share of it: sharding.py) and the same data and draws the same
numbers; each works on its part of a batch, and gradients are summed before a step. A loss is divided by what the whole
batch holds, not by the part, so the step is the one that a single process would take. Alone, every function here does nothing.
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
    """Whether there are others; joins them the first time."""
    # Solon shares the frozen blocks out by itself; transformers and accelerate would each do it again.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ[FSDP] = "1"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ:
        return False
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        from accelerate import PartialState

        # The others wait while the first one judges or writes a model.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=4))
    return True


def world() -> int:
    if not _joined():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def rank() -> int:
    if not _joined():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def sharded() -> bool:
    """Whether the trunk's blocks are shared out over the processes (`accelerate launch --use_fsdp`)."""
    return _joined() and FSDP in os.environ


def turns(parts: Sequence[T], filler: T, together: bool) -> list[tuple[T, bool]]:
    """The parts of a pass through the model that this process works on, and whether each counts.

    together: whether every pass takes all processes, as where its blocks are shared out. Then one with fewer parts than
    another goes through the filler meanwhile, which does not count.
    """
    most = max(gathered([len(parts)], world())) if together else len(parts)
    return [(part, True) for part in parts] + [(filler, False)] * (most - len(parts))


def mine(n: int) -> range:
    """Of n things, those that this process works on."""
    return range(rank(), n, world())


def wait() -> None:
    """Until all processes have come here."""
    if _joined():
        import torch.distributed as dist

        dist.barrier()


def agreed(value: T) -> T:
    """The first process's value."""
    if not _joined():
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def summed(x: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if _joined():
        import torch.distributed as dist

        dist.all_reduce(x)
    return x


def total(x: float) -> float:
    """The sum over processes."""
    if not _joined():
        return x
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"  # nccl knows no other
    return summed(torch.tensor(x, dtype=torch.float64, device=where)).item()


def gathered(items: Sequence[T], n: int) -> list[T]:
    """All n things out of what each process made of `mine(n)`."""
    if not _joined():
        return list(items)
    import torch.distributed as dist

    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(items))
    return [parts[i % world()][i // world()] for i in range(n)]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients; one that had nothing to do adds zeros."""
    if not _joined():
        return
    import torch
    import torch.distributed as dist

    learned = [p for p in parameters if p.requires_grad]
    for p in learned:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    by_kind: dict[torch.dtype, list[Tensor]] = {}
    for p in learned:
        assert p.grad is not None
        by_kind.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_kind.values():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))
