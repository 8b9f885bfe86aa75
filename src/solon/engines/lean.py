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
# q (1, heads, n, d), k and v (1, kv_heads, n, d), scaling, which block → (1, n, heads, d)
Attend = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


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
            q, k, v = (layer(x).view(n, -1, part.head_dim) for layer in (part.q_proj, part.k_proj, part.v_proj))
            q, k, v = (y.transpose(0, 1).unsqueeze(0) for y in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
            got = attend(q, k, v, part.scaling, number)[0].flatten(1)
            if number == len(trunk.layers) - 1:  # nobody sees what else comes out of the last block
                kept = torch.tensor(reads, device=device)
                states, got = states[kept], got[kept]
                gate, up = states.new_empty(len(reads), width), states.new_empty(len(reads), width)
            _add(states, part.o_proj, got)
            x = _norm(block.post_attention_layernorm, states)
            torch.mm(x, block.mlp.gate_proj.weight.T, out=gate)
            torch.mm(x, block.mlp.up_proj.weight.T, out=up)
            _add(states, block.mlp.down_proj, F.silu(gate, inplace=True).mul_(up))
        return self.model.lm_head(_norm(trunk.norm, states))


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
    if model.config.model_type not in FAMILIES or config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return None
    linear = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(m) is not nn.Linear for m in linear):  # adapters, quantised layers
        return None
    made = Lean(model)
    ids = torch.arange(3, 11, device=model.device) % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)
        found = made(ids.tolist(), range(8), _causal, range(8)).float().log_softmax(-1)
    atol, rtol = (
        (1e-3, 0.0) if model.dtype == torch.float32 else (0.2, 0.02)
    )  # bfloat16 rounds to 1 in 256 at each step
    return made if torch.allclose(found, expected, atol=atol, rtol=rtol) else None


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa).transpose(1, 2)
