"""Which layers of a model get adapters (LoRA, Hu et al. 2021): the linear layers of its top blocks, in every family."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from solon.errors import InputError, printable
from solon.models.forward import base_of, blocks_of, replaced
from solon.models.passes import fuse_adapters
from solon.models.paths import paths_of
from solon.models.settings import AdapterSettings


def linear_layers(model: Any, layers: int | None = None) -> list[str]:
    """Names of the linear layers of the top `layers` blocks (None: of all blocks), as in `named_modules`.

    Experts of a mixture that are bare parameters are not linear layers. Raises InputError where the model has no list of
    blocks, or the blocks have no linear layer.
    """
    base, named_blocks = base_of(model), blocks_of(model)
    if named_blocks is None:
        raise InputError(f"{type(base).__name__}: adapters cannot be put on it: it has no list of blocks")
    prefix, blocks = named_blocks
    first = 0 if layers is None else max(0, len(blocks) - layers)
    names = [
        f"{prefix}.{number}.{name}"
        for number in range(first, len(blocks))
        for name, module in blocks[number].named_modules()
        if _is_linear(module)
    ]
    if not names:
        raise InputError(f"{type(base).__name__}: adapters cannot be put on it: its blocks have no linear layer")
    return names


def _is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer of torch, of a quantisation library, or of GPT-2.

    A family's own subclass (as in Falcon) counts where it computes the linear product of torch. Some subclasses are routers or
    grouped products, for which an adapter would be wrong.
    """
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return isinstance(module, (nn.Linear, Conv1D))
    weight = module.weight
    x = torch.linspace(-1, 1, 2 * module.in_features, device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError, IndexError):
        expected = nn.functional.linear(x, weight, module.bias)
        out = module(x)
        return isinstance(out, torch.Tensor) and torch.allclose(out, expected, rtol=1e-3)
    return False


def exact_names() -> AbstractContextManager[None]:
    """Inside, PEFT takes the names of layers as they are.

    PEFT rewrites the names that experts of a mixture had in older versions of transformers. It then also rewrites other layers
    of the same name, such as the `gate_proj` of a shared expert or of an attention.
    """
    from peft.utils import transformers_weight_conversion as conversion

    return replaced(conversion, "convert_peft_config_for_transformers", lambda *_, **__: None)


def lora_config(model: Any, settings: AdapterSettings, task: str) -> Any:
    """PEFT's configuration for these adapters on this model."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,  # with dropout, the policy that is trained would differ from the policy that was sampled
        target_modules=linear_layers(model, settings.layers),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task,
    )


def adapted_layers(model: Any, adapter: str = "default") -> list[str]:
    """Names of the layers that carry this adapter, as in the model without adapters."""
    modules = base_of(model).named_modules()
    return [name for name, module in modules if hasattr(module, "lora_A") and adapter in module.lora_A]


def add_adapters(model: Any, settings: AdapterSettings, task: str = "CAUSAL_LM") -> Any:
    """The model with trainable adapters, whose weights are float32 in a trunk of any dtype. All other weights are frozen.

    Raises InputError where PEFT puts adapters on other layers than `linear_layers` names.
    """
    from peft import get_peft_model

    paths_of(model)  # the proof runs without adapters
    expected = linear_layers(model, settings.layers)
    try:
        with exact_names():
            peft_model = get_peft_model(model, lora_config(model, settings, task))
    except ValueError as error:  # PEFT refuses layers on which adapters would have no effect
        raise InputError(f"{type(model).__name__}: no adapters can be put on it: {printable(str(error))}") from error
    adapted = adapted_layers(peft_model)
    if differing := sorted(set(adapted) ^ set(expected)):
        raise InputError(
            f"adapters were asked for on {len(expected)} layers and stand on {len(adapted)}; the first that differs is "
            f"{differing[0]}"
        )
    return fuse_adapters(peft_model)
