"""The forward pass of a Llama-like model without gradients, written out in fewer passes over memory.

It computes the blocks of Llama, SmolLM, Mistral, Qwen 2 and Qwen 3: RMSNorm (in Qwen 3 also of queries and keys), rotary
positions, gated SiLU and plain linear layers. The arithmetic is that of transformers' modules. The weights are the model's
own and are read at each call. Shapes: n tokens, heads of width d. q, k, v: queries, keys, values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solon.models.forward import base_of
from solon.models.paths import paths_of
from solon.models.sharding import is_sharded

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# q (1, heads, n, d), k and v (1, kv_heads, n, d), scaling, number of the block → (1, n, heads, d)
Attend = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
Numbers = Sequence[int] | Tensor


class LlamaForward:
    """The forward pass of one model. ids, positions: of n tokens. reads: indices of the tokens whose result is needed."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, ids: Numbers, positions: Numbers, attend: Attend, reads: Sequence[int]) -> Tensor:
        """Logits of the tokens `reads`, (reads, vocabulary)."""
        return self.model.lm_head(self.last_hidden_states(ids, positions, attend, reads))

    def last_hidden_states(self, ids: Numbers, positions: Numbers, attend: Attend, reads: Sequence[int]) -> Tensor:
        """The last hidden states of the tokens `reads`, (reads, width)."""
        return _norm(self.model.model.norm, self.hidden_states(ids, positions, attend, reads=reads))

    @torch.no_grad()
    def hidden_states(
        self,
        ids: Numbers,
        positions: Numbers,
        attend: Attend,
        *,
        reads: Sequence[int] | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """The hidden states that enter block `stop`, or that leave the last block: (n, width), or (reads, width)."""
        trunk, device = self.model.model, self.model.device
        hidden = trunk.embed_tokens(torch.as_tensor(ids, device=device))
        position_ids = torch.as_tensor(positions, device=device).unsqueeze(0)
        cos, sin = (part[0].unsqueeze(1) for part in trunk.rotary_emb(hidden, position_ids))  # (n, 1, d)
        blocks = trunk.layers[:stop]
        buffers: list[Tensor] = []
        for number, block in enumerate(blocks):
            attention, mlp = block.self_attn, block.mlp
            x = _norm(block.input_layernorm, hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (unwrap_lora(layer)(x).view(len(x), -1, attention.head_dim) for layer in projections)
            if hasattr(attention, "q_norm"):
                q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            attended = attend(q, k, v, attention.scaling, number)[0].flatten(1)
            if reads is not None and number == len(blocks) - 1:  # nothing else that leaves the last block is used
                indices = torch.as_tensor(reads, device=device)
                hidden, attended = hidden[indices], attended[indices]
            _add(hidden, unwrap_lora(attention.o_proj), attended)
            x = _norm(block.post_attention_layernorm, hidden)
            weights = [unwrap_lora(layer).weight for layer in (mlp.gate_proj, mlp.up_proj)]
            if not buffers or len(buffers[0]) != len(x):
                buffers = [x.new_empty(len(x), weights[0].shape[0]) for _ in weights]
            gate, up = (torch.mm(x, weight.T, out=out) for weight, out in zip(weights, buffers, strict=True))
            _add(hidden, unwrap_lora(mlp.down_proj), F.silu(gate, inplace=True).mul_(up))
        return hidden


def unwrap_lora(layer: Any) -> nn.Linear:
    """The layer without the adapters around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _norm(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return rms_norm(x, norm.weight, norm.variance_epsilon)[0]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang and Sennrich 2019) of x, and the factor of each row, (..., 1).

    torch's own function goes over a CPU's memory twice as often.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * scale).mul_(weight), scale


def _add(hidden: Tensor, layer: nn.Linear, x: Tensor) -> None:
    """hidden += layer(x)."""
    hidden.addmm_(x, layer.weight.T)
    if layer.bias is not None:
        hidden += layer.bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of the two halves of each head. x: (n, …, d); cos, sin broadcast to it."""
    out, half = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos[..., :half], out=out[..., :half]).addcmul_(second, sin[..., :half], value=-1)
    torch.mul(second, cos[..., half:], out=out[..., half:]).addcmul_(first, sin[..., half:])
    return out


def some_tokens(model: Any) -> Tensor:
    """Eight tokens from all over the vocabulary, to try a model on, (8,).

    The first tokens of a vocabulary are control tokens. Some of them were hardly trained, and rounding decides their numbers.
    """
    eighth = model.config.get_text_config().vocab_size // 8
    return torch.arange(8, device=model.device) * eighth + eighth // 2


def find_llama_forward(model: Any) -> LlamaForward | None:
    """The written-out pass of this model; None where the model has not proved it, or where it would now be wrong."""
    return LlamaForward(model) if paths_of(model).llama_forward and is_plain_llama(model) else None


def is_plain_llama(model: Any) -> bool:
    """Whether `LlamaForward` computes this model: its parts are known, no adapter is on, and no weight is sharded."""
    base = base_of(model)
    config = base.config.get_text_config()
    if base.config.model_type not in FAMILIES or config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return False
    layers = [module for name, module in base.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(unwrap_lora(layer)) is not nn.Linear for layer in layers):  # quantised layers
        return False
    adapters = [layer for layer in layers if layer is not unwrap_lora(layer)]
    return all(not layer.merged and layer.disable_adapters for layer in adapters) and not is_sharded(base)
