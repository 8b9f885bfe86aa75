"""Adapters that learn (LoRA, Hu et al. 2021), in few passes over memory.

PEFT's layers and transformers' blocks serve every case, as chains of small operations that each go over the states and,
backward, once more; on a CPU that takes as long as the products. Here are the same block and its gradients for one case:
a Llama-like block in float32 whose own weights are frozen. `fuse_adapters` puts it into a model where it gives what the
model gives; elsewhere only the adapters' layers take fewer passes. Shapes: x (tokens, width).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from solon.models.fast.attention import GROUPED, grouped_attention
from solon.models.fast.llama_forward import FAMILIES, normed, rotate, some_tokens, unwrap_lora
from solon.models.forward import attention_of, trunk_of
from solon.models.sharding import is_sharded


class _FusedLoraLinears(Function):
    """Linear layers of one input: x Wᵀ + b + s (x Aᵀ) Bᵀ each, added onto something where one layer has it given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, onto: Tensor | None, layers: list[nn.Linear], scales: list[float], *ab: Tensor
    ) -> Any:
        """ab: every A, then every B; none where adapters are switched off."""
        outs = [torch.mm(x, m.weight.T) if onto is None else torch.addmm(onto, x, m.weight.T) for m in layers]
        for y, m in zip(outs, layers, strict=True):
            if m.bias is not None:
                y += m.bias
        down = None
        if ab:
            down = x @ torch.cat(ab[: len(layers)]).T  # one product, not a thin one each
            for y, d, b, s in _each(outs, down, ab, scales):
                y.addmm_(d, b.T, alpha=s)
        ctx.layers, ctx.scales = layers, scales
        ctx.save_for_backward(*((x, down, *ab) if down is not None else ()))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(grads[0], ctx.layers[0].weight)
            for grad, m in zip(grads[1:], ctx.layers[1:], strict=True):
                of_x.addmm_(grad, m.weight)
        of_ab: list[Tensor] = []
        if ctx.saved_tensors:
            x, down, *ab = ctx.saved_tensors
            n = len(ctx.layers)
            up = torch.cat([grad @ b * s for grad, _, b, s in _each(grads, down, ab, ctx.scales)], 1)
            if of_x is not None:
                of_x.addmm_(up, torch.cat(ab[:n]))
            of_ab = [*(up.T @ x).split([len(a) for a in ab[:n]])]
            of_ab += [(grad.T @ d).mul_(s) for grad, d, _, s in _each(grads, down, ab, ctx.scales)]
        return of_x, grads[0] if ctx.needs_input_grad[1] else None, None, None, *of_ab


def _each(outs: Any, down: Tensor, ab: Any, scales: list[float]) -> Any:
    """Of each layer: what comes out of it (or its gradient), x Aᵀ, B and s."""
    n = len(scales)
    return zip(outs, down.split([len(a) for a in ab[:n]], 1), ab[n:], scales, strict=True)


class _Normed(Function):
    """RMSNorm (Zhang and Sennrich 2019) by frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = normed(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, weight = ctx.saved_tensors
        grad = grad * weight
        along = (grad * x).sum(-1, keepdim=True)
        return grad.mul_(scale).addcmul_(x, along.mul_(scale**3), value=-1 / x.shape[-1]), None, None


class _Rotated(Function):
    """Rotary positions (Su et al. 2021). x: (tokens, heads, d); cos, sin: (tokens, 1, d), alike in both halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class _Gated(Function):
    """silu(gate) up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _linears(x: Tensor, onto: Tensor | None, *layers: Any) -> tuple[Tensor, ...]:
    base = [unwrap_lora(m) for m in layers]
    own = [(m, m.active_adapters[0]) for m in layers if _adapts(m)]
    a, b = [m.lora_A[name].weight for m, name in own], [m.lora_B[name].weight for m, name in own]
    return _FusedLoraLinears.apply(x, onto, base, [m.scaling[name] for m, name in own], *a, *b)  # type: ignore[no-untyped-call, no-any-return]


def _adapts(layer: Any) -> bool:
    return (
        hasattr(layer, "lora_A")
        and not layer.disable_adapters
        and any(n in layer.lora_A for n in layer.active_adapters)
    )


def _fits(group: tuple[Any, ...]) -> bool:
    """Whether `_FusedLoraLinears` gives what these layers give: frozen, and all with one adapter or all without."""
    from peft.tuners.lora import Linear

    for m in group:
        base = m.base_layer if type(m) is Linear else m
        if (
            type(base) is not nn.Linear
            or any(p.requires_grad for p in base.parameters())
            or (base is not m and m.merged)
        ):
            return False
        if _adapts(m) and (
            len(m.active_adapters) > 1 or m.lora_A[m.active_adapters[0]].weight.dtype != base.weight.dtype
        ):
            return False
    return len({_adapts(m) for m in group}) == 1


def fused_lora_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    **given: Any,
) -> Any:
    """What the block gives. hidden_states: (batch, length, width)."""
    part, mlp, norms = block.self_attn, block.mlp, [block.input_layernorm, block.post_attention_layernorm]
    learned_norms = [*norms, *(getattr(part, n) for n in ("q_norm", "k_norm") if hasattr(part, n))]
    groups = (part.q_proj, part.k_proj, part.v_proj), (part.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
    if (
        past_key_values is not None
        or hidden_states.dtype != torch.float32
        or (block.gradient_checkpointing and block.training)
        or torch.is_autocast_enabled(hidden_states.device.type)
        or any(n.weight.requires_grad for n in learned_norms)
        or not all(map(_fits, groups))
    ):
        given |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
        return type(block).forward(block, hidden_states, attention_mask=attention_mask, **given)
    batch, length, _ = hidden_states.shape
    cos, sin = (x.expand(batch, -1, -1).flatten(0, 1).unsqueeze(1) for x in position_embeddings)
    states = hidden_states.flatten(0, 1)

    def norm(n: Any, x: Tensor) -> Tensor:
        return _Normed.apply(x, n.weight, n.variance_epsilon)  # type: ignore[no-untyped-call, no-any-return]

    q, k, v = (y.view(len(states), -1, part.head_dim) for y in _linears(norm(norms[0], states), None, *groups[0]))
    if hasattr(part, "q_norm"):
        q, k = norm(part.q_norm, q), norm(part.k_norm, k)
    q, k = (_Rotated.apply(y, cos, sin) for y in (q, k))  # type: ignore[no-untyped-call]
    q, k, v = (y.view(batch, length, -1, part.head_dim).transpose(1, 2) for y in (q, k, v))
    got = grouped_attention(part, q, k, v, attention_mask, scaling=part.scaling)[0]
    [states] = _linears(got.reshape(len(states), -1), states, *groups[1])
    gate, up = _linears(norm(norms[1], states), None, *groups[2])
    [states] = _linears(_Gated.apply(gate, up), states, *groups[3])  # type: ignore[no-untyped-call]
    return states.view(batch, length, -1)


def fuse_adapters(adapted: Any) -> Any:
    """The PEFT model: its adapters in one product, and its blocks written out, each where it proves right.

    Tried are the hidden states and the gradients of the adapters, which are given random weights meanwhile: at the start
    their second matrix is zero, and nothing would show.
    """
    from peft.tuners.lora import Linear

    base = adapted.get_base_model()
    layers = [m for m in adapted.modules() if type(m) is Linear]
    blocks = list(base.base_model.layers) if _writable(base) else []
    for module in (*layers, *blocks):
        vars(module).pop("forward", None)
    if is_sharded(base):  # a trial would take all processes
        _set_forward(layers, fused_lora_linear)
        return adapted
    with _random_adapters(adapted) as learned:
        expected = _tried(base, learned)
        for modules, forward in ((layers, fused_lora_linear), (blocks, fused_lora_block)):
            _set_forward(modules, forward)
            if not _alike(_tried(base, learned), expected, base):  # the model computes something of its own
                for module in modules:
                    vars(module).pop("forward", None)
    return adapted


def _writable(base: Any) -> bool:
    """Whether the model is made of the blocks that `fused_lora_block` computes."""
    config = base.config.get_text_config()
    return (
        base.config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and attention_of(base) == GROUPED
        and base.dtype == torch.float32
        and not is_sharded(base)
    )


def _set_forward(modules: list[Any], forward: Any) -> None:
    for module in modules:
        module.forward = MethodType(forward, module)


@contextmanager
def _random_adapters(adapted: Any) -> Iterator[list[nn.Parameter]]:
    """Inside, the active adapters' second matrices are random and all of their parameters learn. Yields these."""
    named = [(n, p) for n, p in adapted.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    active = set(adapted.active_adapters)
    own = [(n, p) for n, p in named if n.split(".")[-2] in active]
    before = [(p, p.data, p.requires_grad, p.grad) for _, p in own]
    generator = torch.Generator().manual_seed(0)
    try:
        for name, p in own:
            p.requires_grad_(True)
            if ".lora_B." in name:
                p.data = torch.randn(p.shape, generator=generator).to(p) * p.shape[1] ** -0.5
        yield [p for _, p in own]
    finally:
        for p, data, learns, grad in before:
            p.data, p.grad = data, grad
            p.requires_grad_(learns)


def _tried(base: Any, learned: list[nn.Parameter]) -> list[Tensor]:
    """The last hidden states of a few tokens, and the gradients of the adapters."""
    mixed = torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16)
    with torch.enable_grad(), mixed:
        out = trunk_of(base)[1](input_ids=some_tokens(base).unsqueeze(0), use_cache=False).last_hidden_state.float()
        toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad((out * toward).sum(), learned, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(learned, grads, strict=True))]


def _alike(found: list[Tensor], expected: list[Tensor], base: Any) -> bool:
    """Whether they differ by rounding only."""
    sizes = zip(found, expected, strict=True)
    return all(bool((a.float() - b.float()).norm() <= rounding_of(base, 2) * b.float().norm()) for a, b in sizes)


def rounding_of(base: Any, passes: int = 1) -> float:
    """How far two ways through a model's blocks may differ, relative to what comes out of them.

    A block is a chain of about a dozen operations, each of which rounds by half the dtype's epsilon at most; independent
    roundings add up as their squares do. passes: 1 for a forward pass, 2 for a backward pass behind it; each of the two
    sides rounds. Three times that is allowed, since the largest of many tensors' differences is asked about.
    """
    operations = 12 * base.config.get_text_config().num_hidden_layers * passes * 2
    return max(3 * torch.finfo(base.dtype).eps / 2 * operations**0.5, 1e-4)


def fused_lora_linear(layer: Any, x: Tensor) -> Tensor:
    """What PEFT's own layer gives, without dropout: the sum is part of a product."""
    out = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return out
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.scaling[name] * layer.lora_B[name].weight
            down = torch.nn.functional.linear(x.to(a.dtype), a)
            out.view(-1, out.shape[-1]).addmm_(down.flatten(0, -2).to(out.dtype), b.T.to(out.dtype))
    return out
