"""The members of a reward model: adapters and heads on one trunk, as files and on a model in memory.

The directory of a reward model holds each member's adapter in `adapters/N`, and the mean and standard deviation of its
scores in `solon_reward.json`. Adapter 0 is also merged into the weights: AutoModelForSequenceClassification loads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from solon.errors import InputError
from solon.models.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, join_names, not_finite, read_json, tensor_shapes
from solon.models.lora import exact_names
from solon.models.passes import fuse_adapters

NORMALISATION = "solon_reward.json"
ADAPTERS = "adapters"
HEAD = "score.weight"


@dataclass
class Member:
    """One member of the ensemble. mean, std: of its raw scores on the reference responses."""

    head: Any  # last hidden state → raw score
    adapter: str | None = None  # its name on the trunk; None: the trunk is used as it is
    mean: float = 0.0
    std: float = 1.0


def read_normalisation(where: str) -> dict[str, Any]:
    """The contents of `solon_reward.json`: base, system, uncertainty_penalty, and mean and std of each member.

    Raises InputError where the file is missing, or holds something that Solon does not write.
    """
    path = Path(where) / NORMALISATION
    if not path.is_file():
        raise InputError(f"{where}: not a reward model written by Solon (no {NORMALISATION} in it)")
    written = read_json(path)
    first = {"mean": written.get("mean"), "std": written.get("std")}
    facts = {"base": None, "system": None, "uncertainty_penalty": 0.0, "members": [first], **written}
    members: Any = facts["members"]
    if not isinstance(members, list) or not members or not all(isinstance(m, dict) for m in members):
        raise InputError(f"{path}: not written by Solon (members is a list of objects)")
    numbers = [m.get(name) for m in members for name in ("mean", "std")] + [facts["uncertainty_penalty"]]
    finite = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
    if not finite or any(m["std"] <= 0 for m in members):
        raise InputError(f"{path}: mean and std must be finite, and std above 0; train the reward model again")
    if not all(isinstance(facts[name], str | None) for name in ("base", "system")):
        raise InputError(f"{path}: not written by Solon (base and system are texts or null)")
    known = {name: facts[name] for name in ("base", "system", "uncertainty_penalty")}
    known["beginnings"] = written.get("beginnings") is True  # whether it learned beginnings; older ones did not
    return {**known, "members": [{"mean": m["mean"], "std": m["std"]} for m in members]}


def attach_members(trunk: Any, where: str, facts: dict[str, Any], name: str) -> tuple[Any, list[Member]]:
    """The trunk with the adapter of every member, called `NAME-0`, `NAME-1` …, and the members.

    trunk: the model that the members were trained on, without their adapters. facts: from `read_normalisation`.
    """
    members = []
    for n, normalisation in enumerate(facts["members"]):
        path = Path(where) / ADAPTERS / str(n)
        trunk = _attach_adapter(trunk, f"{name}-{n}", path)
        members.append(Member(_read_head(path).to(trunk.device), f"{name}-{n}", **normalisation))
    return trunk.eval(), members


def unmerge_adapter(model: Any, path: Path) -> None:
    """Subtract the adapter in `path` from the weights that it was merged into."""
    from peft import LoraConfig

    config, weights = LoraConfig.from_pretrained(str(path)), _read_tensors(path)
    for name, lora_a in weights.items():
        if name.endswith(".lora_A.weight"):
            lora_b = weights[name.replace(".lora_A.", ".lora_B.")]
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            change = (config.lora_alpha / config.r) * (lora_b @ lora_a)
            layer.weight.data -= change.T if config.fan_in_fan_out else change


@contextmanager
def active_adapter(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside, this adapter of the model is active; None changes nothing.

    PEFT would let the active adapter learn, and no other. Every parameter learns afterwards exactly if it did before.
    """
    if adapter is None:
        yield
        return
    before, learned = model.active_adapter, [p.requires_grad for p in model.parameters()]
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(before)
        for p, learns in zip(model.parameters(), learned, strict=True):
            p.requires_grad_(learns)


def _attach_adapter(model: Any, name: str, path: Path) -> Any:
    """The model with the adapter in `path` under this name. The adapter does not learn."""
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(path))
    weights = {k: v for k, v in _read_tensors(path).items() if ".lora_" in k}
    config.task_type = config.modules_to_save = None
    learned: set[int] = set()
    with exact_names():
        if isinstance(model, PeftModel):
            learned = {id(p) for p in model.parameters() if p.requires_grad}
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    for p in model.parameters():
        p.requires_grad_(id(p) in learned)
    return fuse_adapters(model)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a member's adapter and head. Raises InputError where they are damaged or not finite."""
    from safetensors.torch import load_file

    file = path / ADAPTER_WEIGHTS
    if not file.is_file() or not (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"{path}: not a whole member of a reward model; train the reward model again")
    read_json(path / ADAPTER_CONFIG)
    tensor_shapes(file)
    tensors = load_file(file)
    if bad := not_finite(tensors.items()):
        raise InputError(f"{file}: these tensors are not finite: {join_names(bad)}")
    return tensors


def _read_head(path: Path) -> nn.Module:
    """A member's head, float32. Raises InputError where the file holds none."""
    weights = [v for k, v in _read_tensors(path).items() if k.endswith(HEAD)]
    if len(weights) != 1:
        raise InputError(f"{path / ADAPTER_WEIGHTS}: holds no {HEAD}; train the reward model again")
    head = nn.Linear(weights[0].shape[1], 1, bias=False)
    head.weight = nn.Parameter(weights[0].float(), requires_grad=False)
    return head
