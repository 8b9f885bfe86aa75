"""What PPO changes, and how it is kept: adapters, value head, optimiser, KL coefficient, place in the data, checks.

Randomness comes from the seed and the update's number, so a number says where in the data training is, and a run that is
taken up again goes on along the same path.
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


@dataclass
class State:
    """Everything that an update changes."""

    policy: Any  # the trunk with the policy's adapters; without them it is the reference
    values: torch.nn.Linear  # the value head, on the policy's states
    optimiser: torch.optim.Optimizer
    kl: AdaptiveKL
    good: LastGood  # of all that the optimiser steps
    update: int = 0  # updates done
    kl_seen: float = 0.0  # nats a response, of the last update
    best: dict[str, Tensor] = field(default_factory=dict)  # the adapters of the watch's best check, by name


CHECKPOINT = "ppo.safetensors"
Kept = tuple[dict[str, Tensor], dict[str, Any]]


def pack(state: State, watch: Watch | None, identity: dict[str, Any]) -> Kept:
    """All that the next update needs. identity: of what is trained, how and on what."""
    tensors = {f"policy.{n}": p for n, p in state.policy.named_parameters() if p.requires_grad}
    tensors |= {f"values.{n}": p for n, p in state.values.named_parameters()}
    tensors |= {f"best.{n}": p for n, p in state.best.items()}
    for i, kept in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in kept.items()}
    about = {
        "update": state.update,
        "kl_seen": repr(state.kl_seen),
        "identity": identity,
        "kl_coefficient": repr(state.kl.coefficient),
        "checks": [c.model_dump() for c in watch.checks] if watch else [],
    }
    return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, about


def save(checkpoint: Path, kept: Kept) -> None:
    """Written aside, then renamed: there is always a whole one."""
    from safetensors.torch import save_file

    checkpoint.mkdir(parents=True, exist_ok=True)
    aside = checkpoint / ".next.safetensors"
    save_file(kept[0], aside, metadata={"solon": json.dumps(kept[1])})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, checkpoint / CHECKPOINT)


def updates_in(checkpoint: Path) -> int:
    """How many updates a checkpoint holds; 0 where there is none."""
    return int(_read(checkpoint)[1]["update"]) if (checkpoint / CHECKPOINT).is_file() else 0


def _read(checkpoint: Path) -> Kept:
    """Raises InputError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint / CHECKPOINT, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            about = json.loads(file.metadata()["solon"])
            if not isinstance(about["update"], int) or not isinstance(about["identity"], dict):
                raise ValueError("not of Solon's")
            return kept, about
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{checkpoint / CHECKPOINT}: is damaged ({type(error).__name__}); remove it to begin the training anew"
        ) from error


def restore(checkpoint: Path | None, state: State, watch: Watch | None, identity: dict[str, Any]) -> None:
    """Take up what a checkpoint holds, where there is one. Raises InputError where it is another training's."""
    if checkpoint is None or not (checkpoint / CHECKPOINT).is_file():
        return
    kept, about = _read(checkpoint)
    advice = "give --out another directory, or remove that one"
    check_identity(checkpoint, about["identity"], identity, advice)
    with torch.no_grad():
        for prefix, module in (("policy.", state.policy), ("values.", state.values)):
            for name, parameter in module.named_parameters():
                if prefix + name in kept:
                    parameter.copy_(kept[prefix + name])
    whole = state.optimiser.state_dict()
    for key, value in kept.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            whole["state"].setdefault(int(index), {})[name] = value
    state.optimiser.load_state_dict(whole)
    state.kl.coefficient = float(about["kl_coefficient"])
    state.update, state.kl_seen = about["update"], float(about["kl_seen"])
    state.best = {k.removeprefix("best."): v.to(state.policy.device) for k, v in kept.items() if k.startswith("best.")}
    state.good.keep()
    if watch:
        watch.checks = [Check.model_validate(c) for c in about.get("checks", [])]
