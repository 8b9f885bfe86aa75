"""The blocks of a Llama-like model without gradient, with nothing done twice.

transformers' modules serve every case; here is one: RMSNorm, rotary positions, gated SiLU, plain linear layers (Llama,
SmolLM, Mistral, Qwen 2), with or without RMSNorm of queries and keys (Qwen 3). The arithmetic is the same, in fewer passes over memory: on a CPU, where a pass over the
states costs as much as a tenth of a product, that is a fifth of the time. The weights are the model's own, looked up
at each call. `lean` gives None for any other model, and for one with which it has not proved itself (`models/proof.py`).
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
# q (1, heads, n, d), k and v (1, kv_heads, n, d), scaling, which block → (1, n, heads, d)
Attend = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


class LlamaForward:
    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(
        self, ids: Sequence[int] | Tensor, positions: Sequence[int] | Tensor, attend: Attend, reads: Sequence[int]
    ) -> Tensor:
        """Logits at the places `reads`, (reads, vocabulary). ids, positions: of n tokens."""
        return self.model.lm_head(self.last_hidden_states(ids, positions, attend, reads))

    def last_hidden_states(
        self, ids: Sequence[int] | Tensor, positions: Sequence[int] | Tensor, attend: Attend, reads: Sequence[int]
    ) -> Tensor:
        """The last hidden states at the places `reads`, (reads, width)."""
        return _norm(self.model.model.norm, self.hidden_states(ids, positions, attend, reads=reads))

    @torch.no_grad()
    def hidden_states(
        self,
        ids: Sequence[int] | Tensor,
        positions: Sequence[int] | Tensor,
        attend: Attend,
        *,
        reads: Sequence[int] | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """What enters block `stop`, or comes out of the last one: (n, width), or of `reads` only, (reads, width)."""
        trunk, device = self.model.model, self.model.device
        states = trunk.embed_tokens(torch.as_tensor(ids, device=device))
        where = torch.as_tensor(positions, device=device)
        cos, sin = (x[0].unsqueeze(1) for x in trunk.rotary_emb(states, where.unsqueeze(0)))  # (n, 1, d)
        blocks = trunk.layers[:stop]
        room: list[Tensor] = []
        for number, block in enumerate(blocks):
            part, mlp = block.self_attn, block.mlp
            x = _norm(block.input_layernorm, states)
            q, k, v = (
                unwrap_lora(layer)(x).view(len(x), -1, part.head_dim)
                for layer in (part.q_proj, part.k_proj, part.v_proj)
            )
            if hasattr(part, "q_norm"):
                q, k = _norm(part.q_norm, q), _norm(part.k_norm, k)
            q, k, v = (y.transpose(0, 1).unsqueeze(0) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            got = attend(q, k, v, part.scaling, number)[0].flatten(1)
            if reads is not None and number == len(blocks) - 1:  # nobody sees what else comes out of the last block
                kept = torch.as_tensor(reads, device=device)
                states, got = states[kept], got[kept]
            _add(states, unwrap_lora(part.o_proj), got)
            x = _norm(block.post_attention_layernorm, states)
            gate_proj, up_proj = unwrap_lora(mlp.gate_proj).weight, unwrap_lora(mlp.up_proj).weight
            if not room or len(room[0]) != len(x):
                room = [x.new_empty(len(x), gate_proj.shape[0]) for _ in range(2)]
            gate, up = (torch.mm(x, w.T, out=y) for w, y in zip((gate_proj, up_proj), room, strict=True))
            _add(states, unwrap_lora(mlp.down_proj), F.silu(gate, inplace=True).mul_(up))
        return states


def unwrap_lora(layer: Any) -> nn.Linear:
    """The layer itself, out of the adapters around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _norm(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return normed(x, norm.weight, norm.variance_epsilon)[0]


def normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm (Zhang and Sennrich 2019), and what it multiplied x by. torch's own goes over a CPU's memory twice as often."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * scale).mul_(weight), scale


def _add(states: Tensor, layer: nn.Linear, x: Tensor) -> None:
    """states += layer(x)."""
    states.addmm_(x, layer.weight.T)
    if layer.bias is not None:
        states += layer.bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of the two halves of each head. x: (n, …, d); cos, sin broadcast to it."""
    out, half = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos[..., :half], out=out[..., :half]).addcmul_(b, sin[..., :half], value=-1)
    torch.mul(b, cos[..., half:], out=out[..., half:]).addcmul_(a, sin[..., half:])
    return out


def some_tokens(model: Any) -> Tensor:
    """Eight tokens from all over the vocabulary, to try a model on.

    Not the first ones: control tokens that were hardly trained make numbers that no two ways of rounding agree on.
    """
    eighth = model.config.get_text_config().vocab_size // 8
    return torch.arange(8, device=model.device) * eighth + eighth // 2


def find_llama_forward(model: Any) -> LlamaForward | None:
    """The model's lean form, where it has one now: adapters must be switched off, and the weights all here."""
    return LlamaForward(model) if paths_of(model).llama_forward and is_plain_llama(model) else None


def is_plain_llama(model: Any) -> bool:
    """Whether the model is built of the parts that `LlamaForward` computes, and nothing changes them now."""
    base = base_of(model)
    config = base.config.get_text_config()
    if base.config.model_type not in FAMILIES or config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return False
    linear = [m for name, m in base.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(unwrap_lora(m)) is not nn.Linear for m in linear):  # quantised layers
        return False
    return not any(m is not unwrap_lora(m) and (m.merged or not m.disable_adapters) for m in linear) and not is_sharded(
        base
    )
