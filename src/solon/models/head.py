"""From hidden states to scores over the vocabulary, as the model itself does it.

Families scale the scores (Granite, Cohere), cap them (Gemma 2) or add a bias (Phi) after the output layer. So Solon never
multiplies by the bare output layer: it asks the model's own `forward`, with the hidden states put in the trunk's place.
Where that is a plain product with one factor, which is tried and not assumed, trainers may use the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from solon.models.forward import base_of, forward, trunk_of

VOCABULARY_AT_ONCE = 8192  # rows of the output layer that stand in float32 at a time


class _Given(BaseModelOutputWithPast):
    """A trunk's output that holds hidden states, and nothing else that a family may ask for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Trunk(nn.Module):
    """Stands in the trunk's place and gives the hidden states it was made with."""

    def __init__(self, trunk: Any, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__.update(real=trunk, hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.__dict__["real"], name)
        # OPT asks its trunk's decoder: what computes hidden states is replaced wherever it stands.
        return _Trunk(part, self.__dict__["hidden"]) if isinstance(part, PreTrainedModel) else part

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Given(last_hidden_state=self.__dict__["hidden"])


def float32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ in float32, also of h and W in a narrower type. hidden: (n, width); weight: (vocabulary, width).

    In bfloat16 the product itself would be rounded to steps of 0.25 at scores of 32 to 64, and of 0.06 at 8 to 16.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return (hidden.to(weight.dtype) @ weight.T).float()
        if weight.is_cuda and hidden.dtype == weight.dtype:  # it sums in float32 anyway; here it does not round after
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return torch.cat([hidden.float() @ part.float().T for part in weight.split(VOCABULARY_AT_ONCE)], -1)


class _Float32Product(Function):
    """`float32_product` with a backward pass that keeps nothing of it; W is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        return float32_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        parts = zip(grad.split(VOCABULARY_AT_ONCE, -1), ctx.weight.split(VOCABULARY_AT_ONCE), strict=True)
        found = sum(g @ part.float() for g, part in parts)
        assert isinstance(found, Tensor)
        return found.to(ctx.dtype), None


class _InFloat32(nn.Module):
    """A linear output layer whose product is in float32: in bfloat16 scores move in steps of 0.25."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        layer = self.__dict__["layer"]
        out: Tensor = _Float32Product.apply(hidden, layer.weight)  # type: ignore[no-untyped-call]
        return out if layer.bias is None else out + layer.bias.float()


class Head:
    """Scores over the vocabulary of one causal language model.

    factor: the scores are the bare output layer's times this number, without bias; None where they are something else.
    """

    def __init__(self, model: Any) -> None:
        self.model = base_of(model)
        self.dtype = self.model.dtype
        self.factor = self._factor()

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: (n, width). Returns (n, vocabulary), float32."""
        name, trunk = trunk_of(self.model)
        with _replaced(self.model, name, _Trunk(trunk, hidden.unsqueeze(0))):
            place = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            with self._float32_layer():
                return forward(self.model, input_ids=place, use_cache=False).logits[0].float()

    @property
    def layer(self) -> Any:
        """The bare output layer."""
        return self.model.get_output_embeddings()

    @contextmanager
    def _float32_layer(self) -> Iterator[None]:
        layer = self.layer
        learns = layer is not None and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
        if type(layer) is not nn.Linear or layer.weight.dtype == torch.float32 or learns:
            yield
            return
        name = next(name for name, m in self.model.named_modules() if m is layer)
        with _replaced(self.model, name, _InFloat32(layer)):
            yield

    @torch.no_grad()
    def _factor(self) -> float | None:
        """Tried on states large enough for a cap to show."""
        layer = self.layer
        if type(layer) is not nn.Linear or layer.bias is not None:
            return None
        weight = layer.weight
        directions = weight[torch.linspace(0, len(weight) - 1, 8).long()].float()
        sizes = directions.norm(dim=-1, keepdim=True).clamp(min=1e-6)  # the pad token may be all zeros
        hidden = (100 * directions / sizes).to(weight.dtype)
        bare = _Float32Product.apply(hidden, weight)  # type: ignore[no-untyped-call]
        scores = self(hidden)
        if scores.shape != bare.shape:
            return None
        factor = (scores * bare).sum() / (bare * bare).sum()
        alike = (scores - factor * bare).abs().max() <= 1e-5 * scores.abs().max()
        return float(factor) if bool(alike) else None


@contextmanager
def _replaced(model: Any, name: str, module: nn.Module) -> Iterator[None]:
    """Inside, the submodule of that name is another one."""
    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent) if parent else model
    before = holder._modules[last]
    holder._modules[last] = module
    try:
        yield
    finally:
        holder._modules[last] = before


def head_of(model: Any) -> Head:
    """The head of this model, tried once for each dtype that the model has had."""
    base = base_of(model)
    known: Head | None = vars(base).get("_solon_head")
    if known is None or known.dtype != base.dtype or known.model is not base:
        known = vars(base)["_solon_head"] = Head(base)
    return known


# --- log-probabilities of tokens ------------------------------------------------------------------------------


def logprobs_and_entropy(
    hidden: Tensor,
    head: Any,
    tokens: Tensor,
    temperature: float,
    chunk: int = 256,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and the entropy of its distribution, nats. Both (n,), float32.

    hidden: (n, width), the states that predict; tokens: (n,). head: gives the scores of states, (n, vocabulary); a linear
    layer, or a `models.head.Head`. Scores over the vocabulary exist for `chunk` tokens at a time only, and none is kept
    for the backward pass. entropy: False leaves it at zero and saves its time. The temperature is the one that sampled
    (Huang et al. 2024, detail 3).
    """
    layer, factor = (head, 1.0) if isinstance(head, torch.nn.Module) else (head.layer, head.factor)
    frozen = not any(p.requires_grad for p in layer.parameters())
    product = frozen and type(layer) is torch.nn.Linear and layer.bias is None and factor is not None
    logprobs, entropies = [], []
    for h, t in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
        if product:
            logprob, spread = _FrozenHeadLogprobs.apply(h, layer.weight, t, temperature / factor, entropy)
        else:  # computed again for the backward pass instead of kept
            logprob, spread = checkpoint(_scored, head, h, t, temperature, entropy, use_reentrant=False)
        logprobs.append(logprob)
        entropies.append(spread)
    return torch.cat(logprobs), torch.cat(entropies)


def _scored(head: Any, h: Tensor, t: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    distribution = (head(h).float() / temperature).log_softmax(-1)
    logprob = distribution.gather(-1, t.unsqueeze(-1)).squeeze(-1)
    return logprob, -(distribution.exp() * distribution).sum(-1) if entropy else torch.zeros_like(logprob)


class _FrozenHeadLogprobs(Function):
    """What `logprobs_and_entropy` gives, by a frozen head W. With z = W h / T and p = softmax(z):

        d log p[t] / d h = (W[t] - p W) / T        d entropy / d h = -(p * (log p + entropy)) W / T

    do not depend on what the loss makes of them, so they are computed while p is at hand, and p is not kept.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, t: Tensor, temperature: float, entropy: bool) -> Any:
        z = float32_product(h, weight)
        if temperature != 1:
            z.div_(temperature)
        top = z.amax(-1, keepdim=True)
        said = z.gather(-1, t.unsqueeze(-1))
        p = z.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        logprob = (said - top - total.log()).squeeze(-1)
        p.div_(total)
        learns = h.requires_grad
        grads: list[Tensor | None] = [None, None]
        spread = torch.zeros_like(logprob)
        if learns:
            # One product: of the difference of two, rounded to bfloat16, little is left where p[t] is near 1.
            less = torch.full_like(said, -1.0)
            p.scatter_add_(-1, t.unsqueeze(-1), less)
            grads[0] = -torch.mm(p.to(weight.dtype), weight).float() / temperature
            p.scatter_add_(-1, t.unsqueeze(-1), -less)
        if entropy:
            log_p = p.log().clamp_(min=-100)  # where p is 0 its share is 0, not nan
            spread = -torch.einsum("nv,nv->n", p, log_p)
            if learns:
                p.mul_(log_p.add_(spread.unsqueeze(-1)))
                grads[1] = -torch.mm(p.to(weight.dtype), weight).float() / temperature
        ctx.save_for_backward(*(g for g in grads if g is not None))
        ctx.dtype = h.dtype
        return logprob, spread

    @staticmethod
    def backward(ctx: Any, of_logprob: Tensor, of_entropy: Tensor) -> Any:  # type: ignore[override]
        first, *second = ctx.saved_tensors
        grad = of_logprob.unsqueeze(-1) * first
        if second:
            grad = grad + of_entropy.unsqueeze(-1) * second[0]
        return grad.to(ctx.dtype), None, None, None, None
