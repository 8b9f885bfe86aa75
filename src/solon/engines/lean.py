"""The blocks of a Llama-like model for many tokens and no gradient, with nothing done twice.

transformers' modules serve every case; here is one: RMSNorm, rotary positions, gated SiLU, plain linear layers (Llama,
SmolLM, Mistral, Qwen 2). The arithmetic is the same, in fewer passes over memory: on a CPU, where a pass over the
states costs as much as a tenth of a product, that is a fifth of the time. The weights are the model's own, looked up
at each call. `lean` gives None for any other model, and for one whose logits it does not reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("llama", "mistral", "qwen2")
# q (n, kv_heads, groups, d), scaled; k, v (n, kv_heads, d); which block → (n, heads * d)
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Lean:
    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], positions: Sequence[int], attend: Attend, reads: Sequence[int]) -> Tensor:
        """Logits at the places `reads`, (reads, vocabulary). ids, positions: of n tokens."""
        trunk, device = self.model.model, self.model.device
        states = trunk.embed_tokens(torch.tensor(ids, device=device))
        where = torch.tensor(positions, device=device)
        cos, sin = (x[0].unsqueeze(1) for x in trunk.rotary_emb(states, where.unsqueeze(0)))  # (n, 1, d)
        n, width = len(ids), trunk.layers[0].mlp.gate_proj.out_features
        gate, up = states.new_empty(n, width), states.new_empty(n, width)
        for number, block in enumerate(trunk.layers):
            part = block.self_attn
            x = _norm(block.input_layernorm, states)
            k = part.k_proj(x).view(n, -1, part.head_dim)
            q = part.q_proj(x).view(n, k.shape[1], -1, part.head_dim)
            q = _rotate(q, (cos * part.scaling).unsqueeze(1), (sin * part.scaling).unsqueeze(1))
            got = attend(q, _rotate(k, cos, sin), part.v_proj(x).view(n, -1, part.head_dim), number)
            _add(states, part.o_proj, got)
            x = _norm(block.post_attention_layernorm, states)
            torch.mm(x, block.mlp.gate_proj.weight.T, out=gate)
            torch.mm(x, block.mlp.up_proj.weight.T, out=up)
            _add(states, block.mlp.down_proj, F.silu(gate, inplace=True).mul_(up))
        return self.model.lm_head(_norm(trunk.norm, states[torch.tensor(reads, device=device)]))


def _norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019). torch's own goes over a CPU's memory twice as often."""
    width, epsilon = x.shape[-1], norm.variance_epsilon
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.rms_norm(x, (width,), norm.weight, epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * length.square_().div_(width).add_(epsilon).rsqrt_()).mul_(norm.weight)


def _add(states: Tensor, layer: nn.Linear, x: Tensor) -> None:
    """states += layer(x)."""
    states.addmm_(x, layer.weight.T)
    if layer.bias is not None:
        states += layer.bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of the two halves of each head. x: (n, …, d); cos, sin broadcast to it."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos[..., :half], out=out[..., :half]).addcmul_(b, sin[..., :half], value=-1)
    torch.mul(b, cos[..., half:], out=out[..., half:]).addcmul_(a, sin[..., half:])
    return out


def lean(model: Any) -> Lean | None:
    """The model's lean form, where it has one."""
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES or config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return None
    linear = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(m) is not nn.Linear for m in linear):  # adapters, quantised layers
        return None
    made = Lean(model)
    ids = torch.arange(3, 11, device=model.device) % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)
        found = made(ids.tolist(), range(8), _causal, range(8)).float().log_softmax(-1)
    apart = 1e-3 if model.dtype == torch.float32 else 0.2  # bfloat16 rounds to 1 part in 256 at every step
    return made if torch.allclose(found, expected, atol=apart, rtol=0.02) else None


def _causal(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    q, k, v = q.flatten(1, 2).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)
