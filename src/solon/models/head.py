"""From hidden states to scores over the vocabulary, as the model itself computes them.

After the output layer, families scale the scores (Granite, Cohere), cap them (Gemma 2) or add a bias (Phi). So Solon does not
multiply by the bare output layer. It calls the model's own `forward`, with a module in the trunk's place that returns the
given hidden states. Where the scores prove to be a plain product times one factor, trainers may use the product.
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

from solon.models.forward import base_of, forward, replaced, trunk_of

VOCABULARY_AT_ONCE = 8192  # rows of the output layer that are converted to float32 at a time


class _TrunkOutput(BaseModelOutputWithPast):
    """A trunk's output with hidden states alone. Any other field that a family reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _FixedTrunk(nn.Module):
    """Stands in the trunk's place and returns the hidden states that it was given."""

    def __init__(self, trunk: Any, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__.update(real=trunk, hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.__dict__["real"], name)
        # OPT calls its trunk's decoder, so every part that computes hidden states is replaced.
        return _FixedTrunk(part, self.__dict__["hidden"]) if isinstance(part, PreTrainedModel) else part

    def forward(self, *_: Any, **__: Any) -> Any:
        return _TrunkOutput(last_hidden_state=self.__dict__["hidden"])


def float32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ in float32, also where h and W have a narrower type. hidden: (n, width); weight: (vocabulary, width).

    A product in bfloat16 would round scores of 32 to 64 to steps of 0.25, and scores of 8 to 16 to steps of 0.06.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return (hidden.to(weight.dtype) @ weight.T).float()
        if weight.is_cuda and hidden.dtype == weight.dtype:  # CUDA sums in float32; here it does not round the sum
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return torch.cat([hidden.float() @ part.float().T for part in weight.split(VOCABULARY_AT_ONCE)], -1)


class _Float32Product(Function):
    """`float32_product` with a frozen W. The backward pass needs no float32 copy of W in memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        return float32_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        parts = zip(grad.split(VOCABULARY_AT_ONCE, -1), ctx.weight.split(VOCABULARY_AT_ONCE), strict=True)
        total: Any = sum(grad_part @ part.float() for grad_part, part in parts)
        return total.to(ctx.dtype), None


class Head:
    """Scores over the vocabulary of one causal language model.

    factor: the scores are the product with the bare output layer times this factor, without bias; None: they are not.
    """

    def __init__(self, model: Any) -> None:
        self.model = base_of(model)
        self.dtype = self.model.dtype
        self.factor = self._measure_factor()

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: (n, width). Returns (n, vocabulary), float32."""
        name, trunk = trunk_of(self.model)
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with replaced(self.model, name, _FixedTrunk(trunk, hidden.unsqueeze(0))), self._float32_layer():
            return forward(self.model, input_ids=ids, use_cache=False).logits[0].float()

    @property
    def layer(self) -> Any:
        """The bare output layer."""
        return self.model.get_output_embeddings()

    @contextmanager
    def _float32_layer(self) -> Iterator[None]:
        """Inside, the product of a frozen output layer in a narrower type is in float32."""
        layer = self.layer
        learns = layer is not None and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
        if type(layer) is not nn.Linear or layer.weight.dtype == torch.float32 or learns:
            yield
            return

        def forward(hidden: Tensor) -> Tensor:
            out: Tensor = _Float32Product.apply(hidden, layer.weight)  # type: ignore[no-untyped-call]
            return out if layer.bias is None else out + layer.bias.float()

        vars(layer)["forward"] = forward
        try:
            yield
        finally:
            del vars(layer)["forward"]

    @torch.no_grad()
    def _measure_factor(self) -> float | None:
        """The factor, measured on hidden states that are large enough for a cap to show."""
        layer = self.layer
        if type(layer) is not nn.Linear or layer.bias is not None:
            return None
        weight = layer.weight
        directions = weight[torch.linspace(0, len(weight) - 1, 8).long()].float()
        sizes = directions.norm(dim=-1, keepdim=True).clamp(min=1e-6)  # the pad token may be all zeros
        hidden = (100 * directions / sizes).to(weight.dtype)
        bare = float32_product(hidden, weight)
        scores = self(hidden)
        if scores.shape != bare.shape:
            return None
        factor = (scores * bare).sum() / (bare * bare).sum()
        equal = (scores - factor * bare).abs().max() <= 1e-5 * scores.abs().max()
        return float(factor) if bool(equal) else None


def head_of(model: Any) -> Head:
    """The head of this model. It is made once for each dtype that the model has had."""
    base = base_of(model)
    known: Head | None = vars(base).get("_solon_head")
    if known is None or known.dtype != base.dtype or known.model is not base:
        known = vars(base)["_solon_head"] = Head(base)
    return known


# --- log-probabilities of tokens ------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token, (n,), nats. logits: (n, vocabulary); tokens: (n,)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def logprobs_and_entropy(
    hidden: Tensor, head: Any, tokens: Tensor, temperature: float, chunk: int = 256, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and the entropy of its distribution, nats. Both (n,), float32.

    hidden: (n, width), the states that predict the tokens; tokens: (n,). head: computes the scores of states, (n, vocabulary):
    a linear layer or a `Head`. temperature: that of the sampler (Huang et al. 2024, detail 3). entropy: False returns zeros
    in less time. Scores over the vocabulary exist for `chunk` tokens at a time, and none is kept for the backward pass.
    """
    layer, factor = (head, 1.0) if isinstance(head, nn.Module) else (head.layer, head.factor)
    frozen = not any(p.requires_grad for p in layer.parameters())
    is_product = frozen and type(layer) is nn.Linear and layer.bias is None and factor is not None
    logprobs, entropies = [], []
    for states, targets in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
        if is_product:
            results = _FrozenHeadLogprobs.apply(states, layer.weight, targets, temperature / factor, entropy)
        else:  # computed again for the backward pass instead of kept
            results = checkpoint(_score, head, states, targets, temperature, entropy, use_reentrant=False)
        logprobs.append(results[0])
        entropies.append(results[1])
    return torch.cat(logprobs), torch.cat(entropies)


def _score(head: Any, hidden: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    distribution = (head(hidden).float() / temperature).log_softmax(-1)
    logprobs = distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(distribution.exp() * distribution).sum(-1) if entropy else torch.zeros_like(logprobs)


class _FrozenHeadLogprobs(Function):
    """`logprobs_and_entropy` with a frozen head W. With z = W h / T, p = softmax(z) and a token t, the gradients

        d log p[t] / d h = (W[t] - p W) / T        d entropy / d h = -(p * (log p + entropy)) W / T

    do not depend on the loss. The forward pass computes them while it holds p, and does not keep p.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> Any:
        z = float32_product(h, weight)
        if temperature != 1:
            z.div_(temperature)
        t = tokens.unsqueeze(-1)
        top = z.amax(-1, keepdim=True)
        token_score = z.gather(-1, t)
        p = z.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        logprobs = (token_score - top - total.log()).squeeze(-1)
        p.div_(total)
        grads = []
        entropies = torch.zeros_like(logprobs)
        if h.requires_grad:
            # One product: the difference of two products, rounded to bfloat16, loses its digits where p[t] is near 1.
            minus_one = torch.full_like(token_score, -1.0)
            p.scatter_add_(-1, t, minus_one)
            grads.append(-torch.mm(p.to(weight.dtype), weight).float() / temperature)
            p.scatter_add_(-1, t, -minus_one)
        if entropy:
            log_p = p.log().clamp_(min=-100)  # where p is 0, p log p must be 0 and not nan
            entropies = -torch.einsum("nv,nv->n", p, log_p)
            if h.requires_grad:
                p.mul_(log_p.add_(entropies.unsqueeze(-1)))
                grads.append(-torch.mm(p.to(weight.dtype), weight).float() / temperature)
        ctx.save_for_backward(*grads)
        ctx.dtype = h.dtype
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> Any:  # type: ignore[override]
        of_logprobs, *of_entropies = ctx.saved_tensors
        grad = grad_logprobs.unsqueeze(-1) * of_logprobs
        if of_entropies:
            grad = grad + grad_entropies.unsqueeze(-1) * of_entropies[0]
        return grad.to(ctx.dtype), None, None, None, None
