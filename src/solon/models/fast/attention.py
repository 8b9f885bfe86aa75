"""Attention on grouped keys that are not copied for each query head, under the name `solon_grouped` in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from solon.models.fast import packed_prefix_tree as tree

GROUPED = "solon_grouped"
PLAIN_TOKENS, PLAIN_LENGTH = 4096, 512  # a training batch: above them the (length x length) weights cost memory
# What an attention layer may hand over beside queries, keys, values and mask, and what makes leaving it aside right.
UNDERSTOOD = {
    "scaling",  # used
    "dropout",  # must be 0
    "is_causal",  # must not be False
    "sliding_window",  # is in the mask; a tree's rows are not longer
    "position_ids",  # of use to flash attention alone
    "use_cache",
    "output_attentions",  # must not be True
    "output_router_logits",
    "output_hidden_states",
}


class NotUnderstood(TypeError):
    """An attention layer asks for something that Solon's attention does not compute."""


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that never copies keys and values per query head.

    query: (batch, heads, q, d); key, value: (batch, kv_heads, k, d); attention_mask: (batch, 1, q, k) or None.
    Returns (batch, q, heads, d), None.
    """
    _check_understood(kwargs)
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else float(kwargs["scaling"])
    if tree.active():
        return tree.tree_attention(query, key, value, scaling), None
    batch, heads, q_len, _ = query.shape
    kv_heads = key.shape[1]
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask >= 0  # additive masks hold 0 and the smallest number
    if q_len == 1 and not query.requires_grad:
        return last_token(query, key, value, None if attention_mask is None else ~attention_mask, scaling), None
    if query.device.type == "cpu" and q_len == key.shape[2] and batch * q_len <= PLAIN_TOKENS and q_len <= PLAIN_LENGTH:
        return _plain_attention(query, key, value, attention_mask, scaling), None
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and q_len > 1,
        enable_gqa=heads != kv_heads,
    )
    return out.transpose(1, 2).contiguous(), None


def _check_understood(given: dict[str, Any]) -> None:
    """Raises NotUnderstood where leaving an argument aside would change the numbers."""
    strange = [name for name, value in given.items() if name not in UNDERSTOOD and value is not None]
    if given.get("dropout"):
        strange.append("dropout")
    if given.get("is_causal") is False:
        strange.append("is_causal=False")
    if given.get("output_attentions"):
        strange.append("output_attentions")
    if strange:
        raise NotUnderstood(f"its attention uses {', '.join(sorted(strange))}")


def last_token(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float) -> Tensor:
    """query: (batch, heads, 1, d); hidden: what it must not see, (batch, 1, 1, k). Returns (batch, 1, heads, d)."""
    batch, heads, _, d = query.shape
    weights = torch.matmul(query.reshape(batch, key.shape[1], -1, d), key.transpose(2, 3)).float().mul_(scaling)
    if hidden is not None:
        weights.masked_fill_(hidden, float("-inf"))
    return torch.matmul(weights.softmax(-1).to(value.dtype), value).view(batch, 1, heads, d)


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """The textbook's three steps. Forward and backward of 16 x 130 tokens took 12 ms on two cores, torch's fused one 38.

    The choice between the two must not depend on gradients: PPO's first ratio is 1 because both passes are the same.
    """
    batch, heads, length, d = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, d)
    scores = (torch.matmul(grouped, key.transpose(2, 3)) * scaling).view(batch, heads, length, length)
    if attention_mask is None:
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)  # finite: a row of padding sees nothing
    weights = scores.softmax(-1).view(batch, kv_heads, -1, length)
    return torch.matmul(weights, value).view(batch, heads, length, d).transpose(1, 2).contiguous()


def grouped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask. A tree of rows knows its own, which is plain causal: any other mask is refused."""
    if not tree.active():
        return sdpa_mask(*args, **kwargs)
    window = kwargs.get("local_size")
    if kwargs.get("use_vmap") or (window is not None and tree.longest() > window):
        raise NotUnderstood("its mask is not plain causal")
    return None


AttentionInterface.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, grouped_mask)
