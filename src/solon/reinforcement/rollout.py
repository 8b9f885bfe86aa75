"""Rollouts: the responses that a policy samples, and forward passes over their tokens.

A pass lays the rows out as a packed prefix tree: responses to one prompt share the prompt's tokens, and nothing is padded.
The blocks below the lowest adapter never change. Their outputs are computed once per row, and passes start above them.
Values of response tokens have shape (rollouts, response); `mask` is 1 on a response's tokens and its end-of-turn token.
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
    """Contexts and responses as token ids; one response per context."""

    def __init__(
        self, contexts: list[list[int]], responses: list[list[int]], pad: int, device: torch.device, lower: Any = None
    ) -> None:
        """lower: the policy's lower blocks (`passes.lower_blocks`), which hold these rows; None: passes use all blocks."""
        self.pad, self.device, self.responses, self.lower = pad, device, responses, lower
        self.rows = [c + r for c, r in zip(contexts, responses, strict=True)]
        # The hidden state at one token predicts the next token.
        self.before = [range(len(c) - 1, len(c) + len(r) - 1) for c, r in zip(contexts, responses, strict=True)]
        self.starts = [len(c) for c in contexts]  # the index of each row at which its response begins
        self.mask = torch.zeros(len(responses), max(map(len, responses)), device=device)
        for i, response in enumerate(responses):
            self.mask[i, : len(response)] = 1

    def scatter_to_padded(self, flat: Tensor, indices: Sequence[int]) -> Tensor:
        """Values of the response tokens of some rollouts, (tokens,), as (indices, response) with zeros elsewhere."""
        mask = self.mask[list(indices)].bool()
        return torch.zeros(mask.shape, device=flat.device, dtype=flat.dtype).masked_scatter(mask, flat)

    def parts(self, indices: Sequence[int], tokens: int) -> list[list[int]]:
        """The indices in parts; the rollouts of a part have at most `tokens` distinct tokens."""
        return [[indices[i] for i in part] for part in split_rows([self.rows[i] for i in indices], tokens)]

    def forward(
        self, policy: Any, indices: Sequence[int], temperature: float, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over some rollouts.

        Returns log-probabilities and entropies in nats, both (indices, response), and the hidden states that predict the
        response tokens, (tokens, width). Scores over the vocabulary are computed at those states only. Without `entropy`
        the entropies are zeros.
        """
        rows = [self.rows[i] for i in indices]
        layout = lay_out(policy, rows, self.pad)
        states = self.lower.hidden_states(layout, rows) if self.lower else layout.hidden_states(policy)
        hidden = layout.gather(states, [self.before[i] for i in indices])
        tokens = torch.tensor([t for i in indices for t in self.responses[i]], device=self.device)
        logprobs, entropies = logprobs_and_entropy(hidden, head_of(policy), tokens, temperature, entropy=entropy)
        return self.scatter_to_padded(logprobs, indices), self.scatter_to_padded(entropies, indices), hidden


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
    """One response per context. Of several processes, each samples its part.

    contexts: token ids. ends: the token ids that end a response.
    """
    n = len(contexts)
    uniforms = torch.rand((n, max_tokens), generator=torch.Generator().manual_seed(seed))
    local = distributed.local_indices(n)
    completions: list[Generated] = []
    if local:
        with merged_adapter(policy):
            completions = decode(
                base_of(policy), [contexts[i] for i in local], uniforms[local], max_tokens=max_tokens,
                temperature=temperature, end=ends, pad=pad,
            )  # fmt: skip
    return distributed.all_gather(completions, n)


@contextmanager
def merged_adapter(policy: Any) -> Iterator[None]:
    """Inside, the adapter is added to the weights of its layers: one product per layer instead of three.

    The old weights come back bit by bit. Nothing is merged in bfloat16, where a small change would be rounded away, or where
    processes share the weights.
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
