"""transformers' own forward pass, called in one way for every model family.

Families differ in the arguments of their `forward` (some have no `position_ids`, some no `logits_to_keep`) and in the name of
the module that holds their blocks. This module hides these differences from the rest of Solon.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from solon.errors import InputError


def base_of(model: Any) -> Any:
    """The model without its PEFT wrapper; adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: Any) -> tuple[str, Any]:
    """The part of the model that computes hidden states, all but the output layer, after its name in the model."""
    base = base_of(model)
    if base.base_model is not base:
        return base.base_model_prefix, base.base_model
    for name, part in base.named_children():  # the prefix of Llama 4 is not the name of its trunk
        if isinstance(part, PreTrainedModel):
            return name, part
    raise InputError(f"{type(base).__name__}: cannot be used, because no part of it computes hidden states alone")


@functools.cache
def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the arguments that the function declares."""
    return frozenset(inspect.signature(function).parameters)


def forward(module: Any, *, logits_to_keep: Tensor | int | None = None, **arguments: Any) -> Any:
    """The module's output. Arguments that are None, or that the module does not declare, are left out.

    logits_to_keep: as in transformers, the last N positions or a tensor of indices.
    """
    known = argument_names(type(module).forward)
    if logits_to_keep is not None and "logits_to_keep" in known:
        arguments["logits_to_keep"] = logits_to_keep
    out = module(**{name: value for name, value in arguments.items() if value is not None and name in known})
    if logits_to_keep is not None and "logits_to_keep" not in known:
        selection = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = out.logits[:, selection]
    return out


def attention_of(model: Any) -> str:
    """The name of the attention function that the model uses now."""
    return str(model.config.get_text_config()._attn_implementation)


def use_attention(model: Any, name: str) -> None:
    """Make every part of the model use this attention function.

    Unlike `set_attn_implementation`, this function does not ask whether the model supports it: the proof decides that.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    for config in configs.values():
        config._attn_implementation_internal = name


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute `name` of `holder` is `value`."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def with_attention(model: Any, name: str) -> Iterator[None]:
    """Inside, the model uses this attention function."""
    before = attention_of(model)
    use_attention(model, name)
    try:
        yield
    finally:
        use_attention(model, before)


def window_of(model: Any) -> int | None:
    """How many tokens back a token can see, where some layer of the model limits it; None where no layer does."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(size) for size in sizes if size), default=None)


def blocks_of(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The name of the list of blocks in the model, and the list; None where the model has no such list.

    The list of blocks is the list of `num_hidden_layers` modules with the most parameters.
    """
    base = base_of(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()), default=None)


@contextmanager
def in_higher_precision(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the forward pass computes in `dtype` with the values of the model's weights.

    Only the module that computes holds its weights in that dtype, so a large model needs little more memory. Afterwards the
    weights are the same tensors as before.
    """
    handles: list[Any] = []

    def tensors_of(module: nn.Module) -> list[Tensor]:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return [tensor for tensor in tensors if tensor.is_floating_point()]

    def widen(module: nn.Module, *_: Any) -> None:
        if "_narrow" not in vars(module):
            vars(module)["_narrow"] = [(tensor, tensor.data) for tensor in tensors_of(module)]
            for tensor, narrow in vars(module)["_narrow"]:
                tensor.data = narrow.to(dtype)

    def restore(module: nn.Module, *_: Any) -> None:
        for tensor, narrow in vars(module).pop("_narrow", []):
            tensor.data = narrow

    modules = [module for module in model.modules() if tensors_of(module)]
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            restore(module)
