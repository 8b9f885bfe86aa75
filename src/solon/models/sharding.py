"""A trunk too large for one GPU: each process holds a share of every block's weights (FSDP, Zhao et al. 2023).

`accelerate launch --use_fsdp` asks for it. A block's weights are gathered when a pass comes to it and let go behind it.
They are frozen, so nothing of theirs is reduced: adapters, heads and embeddings are whole in every process, and their
gradients are summed as without shares (`solon/distributed.py`). What follows from gathering is that a pass takes all processes: each
makes as many as the one that has most to do (`distributed.synchronised_steps`).
"""

from __future__ import annotations

from typing import Any

import torch

from solon import distributed
from solon.errors import InputError
from solon.models.forward import trunk_of


def place_model(model: Any, device: torch.device) -> Any:
    """The model to train on the device; of several processes that share it out, with this one's share of its blocks."""
    if distributed.is_sharded():
        from torch.distributed import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        blocks = getattr(trunk_of(model)[1], "layers", None)
        if blocks is None:
            raise InputError(f"--use_fsdp: {type(model).__name__} has no list of blocks to share out; leave it out")
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        model.requires_grad_(False)
        for block in blocks:  # from where it was loaded: the whole model never stands on one device
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return model.to(device)


def is_sharded(model: Any) -> bool:
    """Whether a pass through the model takes all processes."""
    if not distributed.is_sharded():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())
