"""A trunk that is too large for one GPU: each process holds a shard of every block's weights (FSDP, Zhao et al. 2023).

`accelerate launch --use_fsdp` asks for it. A block's weights are gathered when a pass reaches the block, and released after
it. The weights are frozen, so no gradient of theirs is reduced. Adapters, heads and embeddings are whole in every process,
and their gradients are summed as without shards (`solon/distributed.py`). A pass needs all processes, so every process makes
as many passes as the one with the most work (`distributed.synchronised_steps`).
"""

from __future__ import annotations

from typing import Any

import torch

from solon import distributed
from solon.errors import InputError
from solon.models.forward import trunk_of


def place_model(model: Any, device: torch.device) -> Any:
    """The model on the device, ready to be trained; with FSDP, this process's shard of its blocks."""
    if distributed.is_sharded():
        from torch.distributed import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        blocks = getattr(trunk_of(model)[1], "layers", None)
        if blocks is None:
            raise InputError(f"--use_fsdp: {type(model).__name__} has no list of blocks to shard; leave the option out")
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        model.requires_grad_(False)
        for block in blocks:  # before the model moves, so that the whole model is never on one device
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return model.to(device)


def is_sharded(model: Any) -> bool:
    """Whether a pass through the model needs all processes."""
    if not distributed.is_sharded():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
