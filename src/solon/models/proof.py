"""A model proves itself when it is loaded: sampler, scorer and trainer give transformers' own numbers, or are not used.

Each path is run on some tens of tokens: rows of different lengths, some of which begin alike, and a row that ends before the
others. (Not tried are rows beyond a window that is longer than these rows: they go through transformers' own masks.) The log-probability that each path gives to each next token is compared with the reference:
transformers' own eager forward pass, one row at a time, without padding and without a cache.

How far apart may they be? In float32, 1e-4 nats. Where rounding alone does more than that (a deep model, bfloat16), the
bound is derived from the model itself: the reference is computed again in a wider type (float64 for float32, float32 for
bfloat16), which tells how far rounding takes transformers' own numbers. Call that error's median over all tokens e. A path
whose own rounding errors are like those has, on a row of n = 8 tokens, a median above 3 e with probability 2e-4 (errors
taken as normal: each exceeds 3 e with probability 0.043, and four of eight must). So a row's median must not exceed 3 e. A
median, and not the largest, because in a mixture of experts rounding may send a single token to another expert; a wrong
mask, cap, scale or position moves most tokens of at least one row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solon.errors import InputError
from solon.models.forward import (
    attention_of,
    base_of,
    forward,
    in_higher_precision,
    takes,
    trunk_of,
    use_attention,
    window_of,
    with_attention,
)
from solon.models.paths import Paths
from solon.models.sharding import is_sharded

FAST = "SOLON_FAST"  # set to 0: no fast path is tried
FLOAT32_BOUND = 1e-4  # nats
ROUNDING = 3.0  # times the median rounding error of transformers' own numbers: derived above
SAMPLED = 8  # tokens that the sampler writes after each prompt
FEW = 6  # tokens of a row that are too few for the median's bound
Row = list[int]


def probe_rows(vocabulary: int) -> list[Row]:
    """Rows of 11 to 15 tokens from all over the vocabulary; two of them begin alike.

    Not the first tokens of the vocabulary: control tokens that were hardly trained make numbers that no two ways of
    rounding agree on.
    """
    numbers = itertools.count()

    def some(n: int) -> Row:
        step = max(1, vocabulary // 97)
        return [(vocabulary // 8 + 37 * step * next(numbers)) % vocabulary for _ in range(n)]

    shared = some(9)
    return [shared + some(4), shared + some(6), some(11)]


@dataclass(frozen=True)
class Candidate:
    """One way through the model."""

    attention: str
    prefix_tree: bool = False
    llama_forward: bool = False
    padded: bool = True

    def __str__(self) -> str:
        if self.llama_forward:
            return "Solon's own forward pass"
        if self.prefix_tree:
            return "Solon's attention with shared beginnings computed once"
        way = f"{self.attention} attention"
        return way if self.padded else f"{way}, without padding"


def prove(model: Any) -> Paths:
    """Find the fastest path that gives the model's own numbers, and leave the model with that path's attention.

    model: a causal language model, or a sequence classifier (whose hidden states are compared). Raises InputError where no
    path does, with what was found.
    """
    base = base_of(model)
    learning = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _prove(base)
    finally:
        model.train(learning)


def _prove(base: Any) -> Paths:
    native = attention_of(base)
    if native.startswith("solon_"):  # an earlier proof's
        native = "sdpa" if getattr(base, "_supports_sdpa", False) else "eager"
    reference = Reference(base, native)
    notes: list[str] = []
    for candidate in _candidates(base, native):
        use_attention(base, candidate.attention)
        path = Paths(**vars(candidate), window=window_of(base), error=0.0, bound=0.0, dtype=_name(base.dtype))
        vars(base)["_solon_paths"] = base.dtype, path  # the parts of Solon that are tried ask for it
        try:
            error, bound = reference.judge(*_read(base, candidate))
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            NotImplementedError,
            KeyError,
        ) as failure:
            notes.append(f"{candidate}: {_first_line(failure)}")
        else:
            if error <= bound:
                return Paths(**{**vars(path), "error": error, "bound": bound, "notes": tuple(notes)})
            notes.append(f"{candidate}: off by {error:.2g} nats")
        finally:
            vars(base).pop("_solon_paths", None)
    use_attention(base, native)
    raise InputError(
        f"{type(base).__name__} ({base.config.model_type}) cannot be used: no way through it gives transformers' own numbers "
        f"({'; '.join(notes)})"
    )


def _candidates(base: Any, native: str) -> list[Candidate]:
    from solon.models.passes import fast

    found: list[Candidate] = []
    if fast() and _replaceable(base) and os.environ.get(FAST, "1") != "0":
        found += [Candidate(**way) for way in fast().candidates(base, is_causal_lm(base))]
    found.append(Candidate(native))
    if native != "eager" and _replaceable(base):
        found.append(Candidate("eager"))
    return [*found, Candidate(native, padded=False)]


def _replaceable(base: Any) -> bool:
    """Whether the model's layers look their attention function up by name."""
    return bool(base._can_set_attn_implementation()) and "position_ids" in takes(base)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


# --- the reference -----------------------------------------------------------------------------------------------


class Reference:
    """transformers' own numbers for rows of tokens, and how far they are to be trusted."""

    def __init__(self, base: Any, native: str) -> None:
        self.base = base
        self.attention = "eager" if _replaceable(base) else native

    def judge(self, rows: Sequence[Row], paths: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
        """The largest error of these paths and what is allowed, both in nats (or relative, for hidden states).

        paths: of each path, and of each row, the values of its last tokens.
        """
        narrow = self.values(rows)
        if self.base.dtype == torch.float32:
            largest = max(_differences(a, b).max().item() for path in paths for a, b in zip(path, narrow, strict=True))
            if largest <= FLOAT32_BOUND or is_sharded(self.base):
                return largest, FLOAT32_BOUND
        wide = self.values(rows, wider(self.base.dtype))
        rounding = torch.cat([_differences(a, b) for a, b in zip(narrow, wide, strict=True)])
        bound = max(ROUNDING * rounding.median().item(), FLOAT32_BOUND)
        errors = [
            _differences(a, b).median().item()
            for path in paths
            for a, b in zip(path, wide, strict=True)
            if len(a) >= FEW
        ]
        return max(errors), bound

    def values(self, rows: Sequence[Row], dtype: torch.dtype | None = None) -> list[Tensor]:
        """What the path should have given: one row at a time, in the model's dtype or in a wider one."""
        with with_attention(self.base, self.attention):
            if dtype is None or is_sharded(self.base):
                return [self._row(row) for row in rows]
            with in_higher_precision(self.base, dtype):
                return [self._row(row) for row in rows]

    def _row(self, row: Row) -> Tensor:
        ids = torch.tensor([row], device=self.base.device)
        if not is_causal_lm(self.base):
            return forward(trunk_of(self.base)[1], input_ids=ids, use_cache=False).last_hidden_state[0].double()
        logits = forward(self.base, input_ids=ids, use_cache=False).logits[0, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].double()


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def is_causal_lm(base: Any) -> bool:
    return base.get_output_embeddings() is not None


def _differences(values: Tensor, expected: Tensor) -> Tensor:
    """Of each token (the last len(values) of the row): nats for log-probs, relative for hidden states."""
    expected = expected[-len(values) :].to(values.device)
    apart = values.double() - expected
    if apart.dim() == 1:
        return torch.nan_to_num(apart.abs(), nan=float("inf"))
    return torch.nan_to_num(apart.norm(dim=-1) / expected.norm(dim=-1), nan=float("inf"))


# --- the paths ---------------------------------------------------------------------------------------------------


def _read(base: Any, candidate: Candidate) -> tuple[list[Row], list[list[Tensor]]]:
    """Rows of tokens, and what each of the candidate's paths says of them: sampler, trainer, scorer."""
    rows = probe_rows(base.config.get_text_config().vocab_size)
    if not is_causal_lm(base):
        return rows, [_states(base, rows)]
    rows, sampled = _sampled(base, rows)
    return rows, [sampled, _trained(base, rows), *([_scored(base, rows)] if candidate.prefix_tree else [])]


def _sampled(base: Any, prompts: list[Row]) -> tuple[list[Row], list[Tensor]]:
    """The prompts with what the sampler wrote, and its log-probs; the first row ends some tokens before the others."""
    from solon.models.decoding import decode

    uniforms = torch.rand((len(prompts), SAMPLED), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [first] = decode(base, prompts[:1], uniforms[:1], max_tokens=3, temperature=1.0, end=set())
    made = decode(base, prompts, uniforms, max_tokens=SAMPLED, temperature=1.0, end={first.ids[-1]})
    rows = [prompt + m.ids + ([] if m.end is None else [m.end]) for prompt, m in zip(prompts, made, strict=True)]
    return rows, [torch.tensor(m.logprobs, dtype=torch.float64) for m in made]


def _trained(base: Any, rows: list[Row]) -> list[Tensor]:
    """The trainers' log-probs of each row's tokens but the first."""
    from solon.models.head import head_of
    from solon.models.passes import lay_out

    layout = lay_out(base, rows, pad=0)
    hidden = layout.gather(layout.hidden_states(base), [range(len(row) - 1) for row in rows])
    tokens = torch.tensor([t for row in rows for t in row[1:]], device=hidden.device)
    logprobs = head_of(base)(hidden).log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[:, 0]
    return list(logprobs.split([len(row) - 1 for row in rows]))


def _states(base: Any, rows: list[Row]) -> list[Tensor]:
    from solon.models.passes import lay_out

    layout = lay_out(base, rows, pad=0)
    states = layout.gather(layout.hidden_states(base), [range(len(row)) for row in rows])
    return list(states.split([len(row) for row in rows]))


def _scored(base: Any, rows: list[Row]) -> list[Tensor]:
    """The scorer's log-probs of each row's tokens but the first."""
    from solon.models.batching import Row as Asked
    from solon.models.passes import prefix_scorer

    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for picked, logits in prefix_scorer(base, 3072)([Asked(row[:-1], 0) for row in rows]):
        for r, each in zip(picked, logits.split([len(rows[r]) - 1 for r in picked]), strict=True):
            tokens = torch.tensor(rows[r][1:], device=each.device)
            found[r] = each.log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[:, 0]
    return found
