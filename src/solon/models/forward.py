"""transformers' own forward pass, called the same way for every model family.

Families differ in what their `forward` takes (some know no `position_ids`, some no `logits_to_keep`) and in where their
blocks stand. Here are the few things that the rest of Solon needs to know about that.
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
    """The model itself, out of its PEFT wrapper where it has one (adapters stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes(module: Any) -> frozenset[str]:
    """The names of the arguments that this module's `forward` declares."""
    return _declared(type(module).forward)


def trunk_of(model: Any) -> tuple[str, Any]:
    """The part of the model that makes hidden states, with its name in the model: all but the output layer."""
    base = base_of(model)
    if base.base_model is not base:
        return base.base_model_prefix, base.base_model
    for name, part in base.named_children():  # Llama 4 calls it otherwise than it says
        if isinstance(part, PreTrainedModel):
            return name, part
    raise InputError(
        f"{type(base).__name__}: the part that makes hidden states cannot be told apart; it cannot be used"
    )


@functools.cache
def _declared(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def forward(module: Any, *, logits_to_keep: Tensor | int | None = None, **given: Any) -> Any:
    """The module's output. Arguments that are None, or that the module does not know, are left out.

    logits_to_keep: as transformers defines it: the last N positions, or a tensor of indices.
    """
    known = takes(module)
    if logits_to_keep is not None and "logits_to_keep" in known:
        given["logits_to_keep"] = logits_to_keep
    out = module(**{name: value for name, value in given.items() if value is not None and name in known})
    if logits_to_keep is not None and "logits_to_keep" not in known:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = out.logits[:, kept]
    return out


def attention_of(model: Any) -> str:
    """The name of the attention function that the model uses now."""
    return str(model.config.get_text_config()._attn_implementation)


def use_attention(model: Any, name: str) -> None:
    """Make every part of the model use this attention function.

    Unlike `set_attn_implementation` this asks no questions: whether the function gives right numbers is proved afterwards.
    """
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    for config in configs.values():
        config._attn_implementation_internal = name


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
    """Tokens that a token can look back on, where some of the model's layers limit it; None where none does."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(size) for size in sizes if size), default=None)


def blocks_of(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The list of the model's blocks and its name inside the model; None where there is no such list.

    It is the list of `num_hidden_layers` modules that holds the most parameters.
    """
    base = base_of(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in lists]
    return lists[sizes.index(max(sizes))] if lists else None


@contextmanager
def in_higher_precision(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the forward pass computes in `dtype` with the weights' own values, one module at a time.

    Only the module that is at work holds its weights in that dtype, so that a large model needs little more memory. The
    weights come back as they were: a number of a narrower type passes through a wider one unchanged.
    """
    handles: list[Any] = []

    def own(module: nn.Module) -> list[Tensor]:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return [t for t in tensors if t.is_floating_point()]

    def widen(module: nn.Module, *_: Any) -> None:
        if "_narrow" not in vars(module):
            vars(module)["_narrow"] = [(t, t.data) for t in own(module)]
            for t, narrow in vars(module)["_narrow"]:
                t.data = narrow.to(dtype)

    def give_back(module: nn.Module, *_: Any) -> None:
        for t, narrow in vars(module).pop("_narrow", []):
            t.data = narrow

    modules = [m for m in model.modules() if own(m)]
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(give_back))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            give_back(module)
