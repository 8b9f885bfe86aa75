"""Which layers of a model get adapters (LoRA, Hu et al. 2021): the linear layers of its top blocks, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from solon.errors import InputError, printable
from solon.models.forward import base_of, blocks_of
from solon.models.paths import paths_of
from solon.models.settings import AdapterSettings


def linear_layers(model: Any, layers: int | None = None) -> list[str]:
    """Names of the linear layers of the top `layers` blocks (None: of all blocks), as `named_modules` gives them.

    Experts of a mixture that are held as bare parameters are no linear layers, and are not among them. Raises InputError
    where the model has no list of blocks, or the blocks have no linear layer.
    """
    base, found = base_of(model), blocks_of(model)
    if found is None:
        raise InputError(f"{type(base).__name__}: its blocks cannot be told apart, so no adapters can be put on them")
    where, blocks = found
    first = 0 if layers is None else max(0, len(blocks) - layers)
    names = [
        f"{where}.{number}.{name}"
        for number in range(first, len(blocks))
        for name, module in blocks[number].named_modules()
        if _is_linear(module)
    ]
    if not names:
        raise InputError(f"{type(base).__name__}: there is no linear layer in its blocks to put adapters on")
    return names


def _is_linear(module: nn.Module) -> bool:
    """A linear layer of torch, of a quantisation library, or of GPT-2.

    A family's own kind of linear layer (Falcon) is one where it computes what its parent does; some are routers or grouped
    products, for which an adapter would be wrong.
    """
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return isinstance(module, (nn.Linear, Conv1D))
    x = torch.linspace(-1, 1, 2 * module.in_features, device=module.weight.device, dtype=module.weight.dtype).view(
        2, -1
    )
    with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError, IndexError):
        found = module(x)
        return isinstance(found, torch.Tensor) and torch.allclose(
            found, nn.functional.linear(x, module.weight, module.bias), rtol=1e-3
        )
    return False


@contextmanager
def exact_names() -> Iterator[None]:
    """Inside, PEFT takes the names of layers as they are.

    PEFT rewrites names that the experts of a mixture had in older versions of transformers, and with them those of other
    layers that are called the same, such as the `gate_proj` of a shared expert or of an attention.
    """
    from peft.utils import transformers_weight_conversion as conversion

    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before


def lora_config(model: Any, settings: AdapterSettings, task: str) -> Any:
    """PEFT's configuration for these adapters on this model."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,  # dropout would make the policy that is trained another than the one that was sampled
        target_modules=linear_layers(model, settings.layers),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type=task,
    )


def adapted_layers(model: Any, adapter: str = "default") -> list[str]:
    """Names of the layers that carry this adapter, as they are called without it."""
    wrapped = base_of(model).named_modules()
    return [name for name, module in wrapped if hasattr(module, "lora_A") and adapter in module.lora_A]


def check_adapted(model: Any, asked: list[str]) -> None:
    """Raises InputError where other layers carry adapters than the ones asked for."""
    found = adapted_layers(model)
    if set(found) != set(asked):
        odd = sorted(set(found) ^ set(asked))
        raise InputError(
            f"adapters were asked for on {len(asked)} layers and stand on {len(found)}; it differs at {odd[0]}"
        )


def add_adapters(model: Any, settings: AdapterSettings, task: str = "CAUSAL_LM") -> Any:
    """The model with trainable adapters (float32, whatever the trunk's dtype); all else is frozen.

    Raises InputError where other layers were adapted than was asked for.
    """
    from peft import get_peft_model

    from solon.models.passes import fuse_adapters

    paths_of(model)  # proved without adapters
    asked = linear_layers(model, settings.layers)
    try:
        with exact_names():
            adapted = get_peft_model(model, lora_config(model, settings, task))
    except ValueError as error:  # PEFT knows layers whose adapters would do nothing
        raise InputError(f"{type(model).__name__}: no adapters can be put on it: {printable(str(error))}") from error
    check_adapted(adapted, asked)
    return fuse_adapters(adapted)
