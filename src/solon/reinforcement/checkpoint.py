"""The state that PPO changes, and its checkpoint: one file that is always whole.

All randomness follows from the seed and the number of the update. A training that continues from a checkpoint therefore
takes the same path as one that never stopped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solon.errors import InputError
from solon.publishing import check_identity
from solon.reinforcement.monitors import Check, Watch
from solon.reinforcement.ppo import AdaptiveKL
from solon.training.finite import LastGood

CHECKPOINT = "ppo.safetensors"
Snapshot = tuple[dict[str, Tensor], dict[str, Any]]  # the tensors of a checkpoint, and everything else


@dataclass
class State:
    """Everything that an update changes."""

    policy: Any  # the trunk with the policy's adapters; without the adapters it is the reference
    values: torch.nn.Linear  # the value head: the policy's hidden state → value
    optimiser: torch.optim.Optimizer
    kl: AdaptiveKL
    good: LastGood  # of all parameters that the optimiser steps
    update: int = 0  # finished updates
    kl_seen: float = 0.0  # nats per response, in the last update
    best: dict[str, Tensor] = field(default_factory=dict)  # the adapters at the watch's best check, by name


def pack(state: State, watch: Watch | None, identity: dict[str, Any]) -> Snapshot:
    """A copy of everything that the next update needs. identity: everything that decides the path of the training."""
    tensors = {f"policy.{n}": p for n, p in state.policy.named_parameters() if p.requires_grad}
    tensors |= {f"values.{n}": p for n, p in state.values.named_parameters()}
    tensors |= {f"best.{n}": p for n, p in state.best.items()}
    for i, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    facts = {
        "update": state.update,
        "kl_seen": repr(state.kl_seen),
        "identity": identity,
        "kl_coefficient": repr(state.kl.coefficient),
        "checks": [c.model_dump() for c in watch.checks] if watch else [],
    }
    return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, facts


def save(checkpoint: Path, snapshot: Snapshot) -> None:
    """Write the checkpoint under another name, then rename it: a kill leaves the old checkpoint or the new one."""
    from safetensors.torch import save_file

    checkpoint.mkdir(parents=True, exist_ok=True)
    new = checkpoint / ".next.safetensors"
    save_file(snapshot[0], new, metadata={"solon": json.dumps(snapshot[1])})
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, checkpoint / CHECKPOINT)


def updates_in(checkpoint: Path) -> int:
    """How many finished updates a checkpoint holds; 0 where there is no checkpoint."""
    return int(_read(checkpoint)[1]["update"]) if (checkpoint / CHECKPOINT).is_file() else 0


def _read(checkpoint: Path) -> Snapshot:
    """Raises InputError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    path = checkpoint / CHECKPOINT
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            facts = json.loads(file.metadata()["solon"])
            if not isinstance(facts["update"], int) or not isinstance(facts["identity"], dict):
                raise ValueError("Solon did not write this file")
            return tensors, facts
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is damaged ({type(error).__name__}); remove it to begin the training anew"
        ) from error


def restore(checkpoint: Path | None, state: State, watch: Watch | None, identity: dict[str, Any]) -> None:
    """Continue from a checkpoint, where there is one. Raises InputError where another training wrote the checkpoint."""
    if checkpoint is None or not (checkpoint / CHECKPOINT).is_file():
        return
    tensors, facts = _read(checkpoint)
    check_identity(checkpoint, facts["identity"], identity, "give --out another directory, or remove that one")
    with torch.no_grad():
        for prefix, module in (("policy.", state.policy), ("values.", state.values)):
            for name, parameter in module.named_parameters():
                if prefix + name in tensors:
                    parameter.copy_(tensors[prefix + name])
    optimiser = state.optimiser.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            optimiser["state"].setdefault(int(index), {})[name] = value
        elif key.startswith("best."):
            state.best[key.removeprefix("best.")] = value.to(state.policy.device)
    state.optimiser.load_state_dict(optimiser)
    state.kl.coefficient = float(facts["kl_coefficient"])
    state.update, state.kl_seen = facts["update"], float(facts["kl_seen"])
    state.good.keep()
    if watch:
        watch.checks = [Check.model_validate(c) for c in facts.get("checks", [])]
