"""Attention that does not copy keys and values for each query head. transformers knows it as `solon_grouped`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from solon.models.fast import packed_prefix_tree as tree

GROUPED = "solon_grouped"
PLAIN_TOKENS, PLAIN_LENGTH = 4096, 512  # above these the (length x length) weights of plain attention cost memory
# The arguments that an attention layer may hand over beside queries, keys, values and mask, and why Solon may ignore them.
UNDERSTOOD = {
    "scaling",  # used
    "dropout",  # must be 0
    "is_causal",  # must not be False
    "sliding_window",  # the mask holds it; the rows of a tree are not longer
    "position_ids",  # only flash attention uses it
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
    """Attention with keys and values that are not copied for each query head.

    query: (batch, heads, q, d); key, value: (batch, kv_heads, k, d); attention_mask: (batch, 1, q, k) or None.
    Returns (batch, q, heads, d), None. Raises NotUnderstood where ignoring an argument would change the numbers.
    """
    _check_understood(kwargs)
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else float(kwargs["scaling"])
    if tree.is_active():
        return tree.tree_attention(query, key, value, scaling), None
    batch, heads, length, _ = query.shape
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask >= 0  # additive masks hold 0 and the smallest number
    if length == 1 and not query.requires_grad:
        return last_token(query, key, value, None if attention_mask is None else ~attention_mask, scaling), None
    # The choice must not depend on gradients: PPO's first ratio is 1 because both passes compute the same way.
    whole = query.device.type == "cpu" and length == key.shape[2]
    if whole and batch * length <= PLAIN_TOKENS and length <= PLAIN_LENGTH:
        if attention_mask is None:
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        # The masked score is finite: a row of padding sees no token, and its softmax must not be nan.
        masked = query.new_zeros(attention_mask.shape).masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
        return tree.plain_attention(query, key, value, masked, scaling).transpose(1, 2).contiguous(), None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and length > 1,
        enable_gqa=heads != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _check_understood(arguments: dict[str, Any]) -> None:
    refused = {name for name, value in arguments.items() if name not in UNDERSTOOD and value is not None}
    refused |= {name for name in ("dropout", "output_attentions") if arguments.get(name)}
    if arguments.get("is_causal") is False:
        refused.add("is_causal=False")
    if refused:
        raise NotUnderstood(f"its attention uses {', '.join(sorted(refused))}")


def last_token(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float) -> Tensor:
    """Attention of each row's last token.

    query: (batch, heads, 1, d); key, value: (batch, kv_heads, k, d); hidden: True for the keys that the token must not see,
    (batch, 1, 1, k). Returns (batch, 1, heads, d).
    """
    batch, heads, _, width = query.shape
    weights = torch.matmul(query.reshape(batch, key.shape[1], -1, width), key.transpose(2, 3)).float().mul_(scaling)
    if hidden is not None:
        weights.masked_fill_(hidden, float("-inf"))
    return torch.matmul(weights.softmax(-1).to(value.dtype), value).view(batch, 1, heads, width)


def grouped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask, or None while a tree is active: the tree has a mask of its own.

    The tree's mask is plain causal. Raises NotUnderstood where the model asks for any other mask.
    """
    if not tree.is_active():
        return sdpa_mask(*args, **kwargs)
    window = kwargs.get("local_size")
    if kwargs.get("use_vmap") or (window is not None and tree.longest_row() > window):
        raise NotUnderstood("its mask is not plain causal")
    return None


AttentionInterface.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, grouped_mask)
