"""A Llama-like block with LoRA adapters that learn (Hu et al. 2021), written out in few passes over memory.

PEFT's layers and transformers' blocks are chains of small operations. Each operation goes over the states once, and once more
in the backward pass; on a CPU this takes as long as the products. Here are the same block and its gradients for one case: a
Llama-like block in float32 whose own weights are frozen. `fuse_adapters` uses the block where it gives the model's own
numbers; in other models only the adapters' layers take fewer passes.

Symbols: x (tokens, width) is the input of a layer; W its frozen weight and b its bias; A and B the matrices of its adapter,
and s = alpha / rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from solon.models.fast.attention import GROUPED, grouped_attention
from solon.models.fast.llama_forward import FAMILIES, rms_norm, rotate, some_tokens, unwrap_lora
from solon.models.forward import attention_of, trunk_of
from solon.models.sharding import is_sharded


class _FusedLoraLinears(Function):
    """Linear layers that share the input x: x Wᵀ + b + s (x Aᵀ) Bᵀ for each of them, and a residual on top of a single layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, layers: list[nn.Linear], scales: list[float], *adapters: Tensor
    ) -> Any:
        """adapters: the A of every layer, then the B of every layer; none where the adapters are switched off."""
        outputs = [
            torch.mm(x, layer.weight.T) if residual is None else torch.addmm(residual, x, layer.weight.T)
            for layer in layers
        ]
        for output, layer in zip(outputs, layers, strict=True):
            if layer.bias is not None:
                output += layer.bias
        saved: tuple[Tensor, ...] = ()
        if adapters:
            x_a = x @ torch.cat(adapters[: len(layers)]).T  # one product instead of a thin product per layer
            saved = x, x_a, *adapters
            for output, layer_x_a, b, scale in _by_layer(outputs, x_a, adapters, scales):
                output.addmm_(layer_x_a, b.T, alpha=scale)
        ctx.layers, ctx.scales = layers, scales
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grads[0], ctx.layers[0].weight)
            for grad, layer in zip(grads[1:], ctx.layers[1:], strict=True):
                grad_x.addmm_(grad, layer.weight)
        grad_a: Sequence[Tensor] = ()
        grad_b: Sequence[Tensor] = ()
        if ctx.saved_tensors:
            x, x_a, *adapters = ctx.saved_tensors
            n = len(ctx.layers)
            by_layer = [*_by_layer(grads, x_a, adapters, ctx.scales)]
            grad_x_a = torch.cat([grad @ b * scale for grad, _, b, scale in by_layer], 1)
            if grad_x is not None:
                grad_x.addmm_(grad_x_a, torch.cat(adapters[:n]))
            grad_a = (grad_x_a.T @ x).split([len(a) for a in adapters[:n]])
            grad_b = [(grad.T @ layer_x_a).mul_(scale) for grad, layer_x_a, _, scale in by_layer]
        return grad_x, grads[0] if ctx.needs_input_grad[1] else None, None, None, *grad_a, *grad_b


def _by_layer(outputs: Any, x_a: Tensor, adapters: Sequence[Tensor], scales: list[float]) -> Any:
    """For each layer: its output (or the gradient of that), its x Aᵀ, its B and its s."""
    n = len(scales)
    return zip(outputs, x_a.split([len(a) for a in adapters[:n]], 1), adapters[n:], scales, strict=True)


class _RMSNorm(Function):
    """RMSNorm (Zhang and Sennrich 2019) with frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, scale, weight = ctx.saved_tensors
        grad = grad * weight
        along_x = (grad * x).sum(-1, keepdim=True)
        return grad.mul_(scale).addcmul_(x, along_x.mul_(scale**3), value=-1 / x.shape[-1]), None, None


class _Rotary(Function):
    """Rotary positions (Su et al. 2021). x: (tokens, heads, d); cos, sin: (tokens, 1, d), with two equal halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class _GatedSiLU(Function):
    """silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _linears(x: Tensor, residual: Tensor | None, *layers: Any) -> tuple[Tensor, ...]:
    adapters = [(layer, layer.active_adapters[0]) for layer in layers if _has_adapter_on(layer)]
    return _FusedLoraLinears.apply(  # type: ignore[no-untyped-call, no-any-return]
        x,
        residual,
        [unwrap_lora(layer) for layer in layers],
        [layer.scaling[name] for layer, name in adapters],
        *(layer.lora_A[name].weight for layer, name in adapters),
        *(layer.lora_B[name].weight for layer, name in adapters),
    )


def _has_adapter_on(layer: Any) -> bool:
    names = layer.active_adapters if hasattr(layer, "lora_A") and not layer.disable_adapters else ()
    return any(name in layer.lora_A for name in names)


def _can_fuse(layers: tuple[Any, ...]) -> bool:
    """Whether `_FusedLoraLinears` computes these layers: frozen ones, of which all or none have one adapter on."""
    from peft.tuners.lora import Linear

    for layer in layers:
        base = layer.base_layer if type(layer) is Linear else layer
        if type(base) is not nn.Linear or any(p.requires_grad for p in base.parameters()):
            return False
        if base is not layer and layer.merged:
            return False
        if _has_adapter_on(layer):
            first, *others = layer.active_adapters
            if others or layer.lora_A[first].weight.dtype != base.weight.dtype:
                return False
    return len({_has_adapter_on(layer) for layer in layers}) == 1


def fused_lora_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    **options: Any,
) -> Any:
    """The output of a Llama-like block, (batch, length, width). hidden_states: (batch, length, width).

    Where the block is in a state that this function does not cover, the block's own forward computes it.
    """
    attention, mlp = block.self_attn, block.mlp
    norms = [block.input_layernorm, block.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    gate_up = mlp.gate_proj, mlp.up_proj
    if (
        past_key_values is not None
        or hidden_states.dtype != torch.float32
        or (block.gradient_checkpointing and block.training)
        or torch.is_autocast_enabled(hidden_states.device.type)
        or any(module.weight.requires_grad for module in norms)
        or not all(map(_can_fuse, (qkv, (attention.o_proj,), gate_up, (mlp.down_proj,))))
    ):
        options |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
        return type(block).forward(block, hidden_states, attention_mask=attention_mask, **options)
    batch, length, _ = hidden_states.shape
    cos, sin = (part.expand(batch, -1, -1).flatten(0, 1).unsqueeze(1) for part in position_embeddings)
    hidden = hidden_states.flatten(0, 1)

    def norm(module: Any, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call, no-any-return]

    projected = _linears(norm(block.input_layernorm, hidden), None, *qkv)
    q, k, v = (part.view(len(hidden), -1, attention.head_dim) for part in projected)
    if hasattr(attention, "q_norm"):
        q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
    q, k = (_Rotary.apply(part, cos, sin) for part in (q, k))  # type: ignore[no-untyped-call]
    q, k, v = (part.view(batch, length, -1, attention.head_dim).transpose(1, 2) for part in (q, k, v))
    attended = grouped_attention(attention, q, k, v, attention_mask, scaling=attention.scaling)[0]
    [hidden] = _linears(attended.reshape(len(hidden), -1), hidden, attention.o_proj)
    gate, up = _linears(norm(block.post_attention_layernorm, hidden), None, *gate_up)
    [hidden] = _linears(_GatedSiLU.apply(gate, up), hidden, mlp.down_proj)  # type: ignore[no-untyped-call]
    return hidden.view(batch, length, -1)


def fused_lora_linear(layer: Any, x: Tensor) -> Tensor:
    """The output of PEFT's own layer without dropout. The adapter is added within a product."""
    out = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return out
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.scaling[name] * layer.lora_B[name].weight
            x_a = F.linear(x.to(a.dtype), a)
            out.view(-1, out.shape[-1]).addmm_(x_a.flatten(0, -2).to(out.dtype), b.T.to(out.dtype))
    return out


def fuse_adapters(model: Any) -> Any:
    """The PEFT model, whose adapter layers and blocks are replaced where the replacement proves right.

    Hidden states and the adapters' gradients are compared. The adapters get random weights meanwhile: at the start their
    second matrix is zero, and no difference would show.
    """
    from peft.tuners.lora import Linear

    base = model.get_base_model()
    layers: list[Any] = [module for module in model.modules() if type(module) is Linear]
    blocks: list[Any] = list(base.base_model.layers) if _has_fusible_blocks(base) else []
    for module in (*layers, *blocks):
        vars(module).pop("forward", None)
    if is_sharded(base):  # a comparison would need all processes
        for layer in layers:
            layer.forward = MethodType(fused_lora_linear, layer)
        return model
    with _random_adapters(model) as learned:
        expected = _states_and_gradients(base, learned)
        for modules, forward in ((layers, fused_lora_linear), (blocks, fused_lora_block)):
            for module in modules:
                module.forward = MethodType(forward, module)
            if not _differ_by_rounding(_states_and_gradients(base, learned), expected, base):
                for module in modules:
                    vars(module).pop("forward", None)
    return model


def _has_fusible_blocks(base: Any) -> bool:
    """Whether the model is made of the blocks that `fused_lora_block` computes."""
    return (
        base.config.model_type in FAMILIES
        and base.config.get_text_config().hidden_act == "silu"
        and attention_of(base) == GROUPED
        and base.dtype == torch.float32
        and not is_sharded(base)
    )


@contextmanager
def _random_adapters(model: Any) -> Iterator[list[nn.Parameter]]:
    """Inside, the B matrices of the active adapters are random, and all parameters of the adapters learn. Yields these."""
    active = set(model.active_adapters)
    adapters = [
        (name, p)
        for name, p in model.named_parameters()
        if (".lora_A." in name or ".lora_B." in name) and name.split(".")[-2] in active
    ]
    before = [(p, p.data, p.requires_grad, p.grad) for _, p in adapters]
    generator = torch.Generator().manual_seed(0)
    try:
        for name, p in adapters:
            p.requires_grad_(True)
            if ".lora_B." in name:
                p.data = torch.randn(p.shape, generator=generator).to(p) * p.shape[1] ** -0.5
        yield [p for _, p in adapters]
    finally:
        for p, data, learns, grad in before:
            p.data, p.grad = data, grad
            p.requires_grad_(learns)


def _states_and_gradients(base: Any, learned: list[nn.Parameter]) -> list[Tensor]:
    """The last hidden states of a few tokens, and the gradients of the adapters for a random loss."""
    mixed = torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16)
    with torch.enable_grad(), mixed:
        out = trunk_of(base)[1](input_ids=some_tokens(base).unsqueeze(0), use_cache=False).last_hidden_state.float()
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad((out * direction).sum(), learned, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(learned, grads, strict=True))]


def _differ_by_rounding(tensors: list[Tensor], expected: list[Tensor], base: Any) -> bool:
    """Whether the tensors differ from the expected ones by rounding only."""
    bound = rounding_bound(base, passes=2)
    pairs = zip(tensors, expected, strict=True)
    return all(bool((a.float() - b.float()).norm() <= bound * b.float().norm()) for a, b in pairs)


def rounding_bound(base: Any, passes: int = 1) -> float:
    """How far two ways to compute a model's blocks may differ, relative to the norm of their output.

    A block is a chain of about a dozen operations. Each operation rounds by half the dtype's epsilon at most, and independent
    roundings add up as their squares do. passes: 1 for a forward pass, 2 with the backward pass after it; each of the two
    sides rounds. Three times that is allowed, because the largest difference of many tensors counts.
    """
    operations = 12 * base.config.get_text_config().num_hidden_layers * passes * 2
    return max(3 * torch.finfo(base.dtype).eps / 2 * operations**0.5, 1e-4)
