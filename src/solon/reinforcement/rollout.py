"""Rollouts: the responses that a policy samples, and passes over their tokens.

One trunk serves policy and reference: the reference is the policy with its adapters switched off. A pass lays the rows
out as a tree (`states.py`), so that responses to one prompt share it and nothing is padded; what lies below the lowest
adapter never changes, so its outputs are computed once and the passes start there (`frozen.py`).
Responses stand in tensors of (rollouts, response), where `mask` is 1 on their tokens, the end-of-turn token included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.models.batching import split_rows
from solon.models.decoding import Generated, decode
from solon.models.forward import base_of
from solon.models.head import head_of, logprobs_and_entropy
from solon.models.passes import lay_out
from solon.models.sharding import is_sharded


class Rollouts:
    """Contexts and responses, both token ids; one response a context."""

    def __init__(
        self,
        contexts: list[list[int]],
        responses: list[list[int]],
        pad: int,
        device: torch.device,
        lower: Any = None,
    ) -> None:
        """lower: the policy's lower blocks (`passes.lower_blocks`) with these rows in them; None: passes start at the bottom."""
        self.pad, self.device, self.responses, self.lower = pad, device, responses, lower
        self.rows = [c + r for c, r in zip(contexts, responses, strict=True)]
        # The state of the token before predicts a token.
        self.before = [range(len(c) - 1, len(c) + len(r) - 1) for c, r in zip(contexts, responses, strict=True)]
        self.mask = torch.zeros(len(responses), max(map(len, responses)), device=device)
        for i, response in enumerate(responses):
            self.mask[i, : len(response)] = 1

    def spread(self, flat: Tensor, which: Sequence[int]) -> Tensor:
        """Values of the response tokens of some rollouts, one after another, as (which, response); 0 elsewhere."""
        mask = self.mask[list(which)].bool()
        return torch.zeros(mask.shape, device=flat.device, dtype=flat.dtype).masked_scatter(mask, flat)

    def parts(self, which: Sequence[int], tokens: int) -> list[list[int]]:
        """Some rollouts in parts of at most so many distinct tokens."""
        return [[which[i] for i in part] for part in split_rows([self.rows[w] for w in which], tokens)]

    def passed(
        self, policy: Any, which: Sequence[int], temperature: float, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over some rollouts: log-probs, entropies (nats), (which, response); states, (tokens, width).

        Scores over the vocabulary exist for response tokens only. The states are those that predict them.
        """
        rows = [self.rows[w] for w in which]
        layout = lay_out(policy, rows, self.pad)
        states = self.lower.hidden_states(layout, rows) if self.lower else layout.hidden_states(policy)
        hidden = layout.gather(states, [self.before[w] for w in which])
        said = torch.tensor([t for w in which for t in self.responses[w]], device=self.device)
        logprobs, entropies = logprobs_and_entropy(hidden, head_of(policy), said, temperature, entropy=entropy)
        return self.spread(logprobs, which), self.spread(entropies, which), hidden


@torch.no_grad()
def sample(
    policy: Any,
    contexts: list[list[int]],
    *,
    seed: int,
    max_tokens: int,
    temperature: float,
    ends: Collection[int],
    pad: int,
) -> list[Generated]:
    """One response a context. The adapters stand in the weights meanwhile. Of several processes each samples its part."""
    n = len(contexts)
    uniforms = torch.rand((n, max_tokens), generator=torch.Generator().manual_seed(seed))
    own = distributed.local_indices(n)
    made: list[Generated] = []
    if own:
        with merged(policy):
            asked = [contexts[i] for i in own]
            made = decode(
                base_of(policy), asked, uniforms[own], max_tokens=max_tokens, temperature=temperature, end=ends, pad=pad
            )
    return distributed.all_gather(made, n)


@contextmanager
def merged(policy: Any) -> Iterator[None]:
    """Inside, each adapter is part of its layer's weights: one product a layer instead of three.

    The weights of before come back bit for bit. In bfloat16 a small change would be rounded away, so there nothing is
    merged, nor where processes share the weights.
    """
    layers = [m for m in policy.modules() if hasattr(m, "get_delta_weight") and hasattr(m, "get_base_layer")]
    if base_of(policy).dtype != torch.float32 or not layers or is_sharded(policy):
        yield
        return
    name = policy.active_adapter
    layers = [m for m in layers if name in m.lora_A]
    before = [m.get_base_layer().weight.data for m in layers]
    try:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight + layer.get_delta_weight(name)
        with policy.disable_adapter():
            yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
