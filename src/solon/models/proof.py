"""A model proves Solon's passes when it is loaded: a pass that does not give transformers' own numbers is not used.

Sampler, scorer and trainer run on some tens of tokens: rows of different lengths, some of which begin alike, and a row that
ends before the others. Each gives a log-probability for each next token. The reference is transformers' own eager forward
pass of one row at a time, without padding and without a cache. (Rows beyond a window that is longer than these rows are not
tried: they go through transformers' own masks.)

How large may a difference be? In float32, 1e-4 nats. Where rounding alone causes more (a deep model, bfloat16), the model
itself gives the bound. The reference is computed again in a wider type (float64 for float32, float32 for bfloat16), which
gives the rounding errors of transformers' own numbers. Let e be the median of their sizes over all tokens. A pass with
rounding errors of the same size has, on a row of n = 8 tokens, a median above 3 e with probability 2e-4: for normal errors,
one exceeds 3 e with probability 0.043, and four of eight must. So a row's median must not exceed 3 e. The median decides and
not the largest error, because in a mixture of experts rounding may send a single token to another expert. A wrong mask, cap,
scale or position moves most tokens of at least one row.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solon.errors import InputError
from solon.models.batching import Row
from solon.models.decoding import decode
from solon.models.forward import (
    argument_names,
    attention_of,
    base_of,
    forward,
    in_higher_precision,
    trunk_of,
    use_attention,
    window_of,
    with_attention,
)
from solon.models.head import head_of, token_logprobs
from solon.models.passes import fast, lay_out, prefix_scorer
from solon.models.paths import FAST, Paths
from solon.models.sharding import is_sharded

FLOAT32_BOUND = 1e-4  # nats
ROUNDING = 3.0  # the bound is this many times the median rounding error: derived above
SAMPLED = 8  # tokens that the sampler writes after each prompt
FEW = 6  # rows with fewer tokens than this are too short for the median's bound
Ids = list[int]


def probe_rows(vocabulary: int) -> list[Ids]:
    """Rows of 11 to 15 tokens from all over the vocabulary; two of them begin alike.

    The first tokens of a vocabulary are control tokens. Some of them were hardly trained, and rounding decides their numbers.
    """
    numbers = itertools.count()
    step = max(1, vocabulary // 97)

    def some(n: int) -> Ids:
        return [(vocabulary // 8 + 37 * step * next(numbers)) % vocabulary for _ in range(n)]

    shared = some(9)
    return [shared + some(4), shared + some(6), some(11)]


def prove(model: Any) -> Paths:
    """Find the fastest path that gives the model's own numbers, and leave the model with the attention of that path.

    model: a causal language model, or a sequence classifier, whose hidden states are compared. Raises InputError where no path
    gives the model's own numbers.
    """
    learning = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _prove(base_of(model))
    finally:
        model.train(learning)


def _prove(base: Any) -> Paths:
    native = attention_of(base)
    if native.startswith("solon_"):  # an earlier proof has set it
        native = "sdpa" if getattr(base, "_supports_sdpa", False) else "eager"
    notes: list[str] = []
    for path in _candidates(base, native):
        use_attention(base, path.attention)
        vars(base)["_solon_paths"] = base.dtype, path  # sampler, scorer and trainer read it
        try:
            error, bound = _compare(base, "eager" if _can_choose_attention(base) else native, *_run(base, path))
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as failure:
            first_line = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
            notes.append(f"{path.name}: {first_line[:160]}")
        else:
            if error <= bound:
                return replace(path, error=error, bound=bound, notes=tuple(notes))
            notes.append(f"{path.name}: off by {error:.2g} nats")
        finally:
            vars(base).pop("_solon_paths", None)
    use_attention(base, native)
    raise InputError(
        f"{type(base).__name__} ({base.config.model_type}) cannot be used: no way through it gives transformers' own numbers "
        f"({'; '.join(notes)})"
    )


def _candidates(base: Any, native: str) -> list[Paths]:
    """The paths to try, the fastest first. native: the attention that transformers chose for the model."""
    plain = Paths(native, window=window_of(base), dtype=str(base.dtype).removeprefix("torch."))
    candidates = [plain, replace(plain, padded=False)]
    if _can_choose_attention(base):
        if native != "eager":
            candidates.insert(1, replace(plain, attention="eager"))
        if fast() and os.environ.get(FAST, "1") != "0":
            candidates[:0] = [replace(plain, **fields) for fields in fast().candidates(base, is_causal_lm(base))]
    return candidates


def _can_choose_attention(base: Any) -> bool:
    """Whether the model's layers look up their attention function by its name."""
    return bool(base._can_set_attn_implementation()) and "position_ids" in argument_names(type(base).forward)


def is_causal_lm(base: Any) -> bool:
    """Whether the model scores the vocabulary."""
    return base.get_output_embeddings() is not None


# --- the reference -----------------------------------------------------------------------------------------------


def _compare(base: Any, attention: str, rows: Sequence[Ids], passes: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
    """The largest error of these passes and the allowed error, both in nats (relative for hidden states).

    attention: that of the reference. passes: for each pass and each row, the values of the row's last tokens.
    """
    narrow = _reference_values(base, attention, rows, None)
    if base.dtype == torch.float32:
        pairs = [pair for values in passes for pair in zip(values, narrow, strict=True)]
        largest = max(_differences(values, expected).max().item() for values, expected in pairs)
        if largest <= FLOAT32_BOUND or is_sharded(base):
            return largest, FLOAT32_BOUND
    wide = _reference_values(base, attention, rows, torch.float64 if base.dtype == torch.float32 else torch.float32)
    rounding = torch.cat([_differences(values, expected) for values, expected in zip(narrow, wide, strict=True)])
    bound = max(ROUNDING * rounding.median().item(), FLOAT32_BOUND)
    pairs = [pair for values in passes for pair in zip(values, wide, strict=True) if len(pair[0]) >= FEW]
    return max(_differences(values, expected).median().item() for values, expected in pairs), bound


def _reference_values(base: Any, attention: str, rows: Sequence[Ids], dtype: torch.dtype | None) -> list[Tensor]:
    """transformers' own values for each row alone. dtype: a wider type to compute in; None: the model's own."""
    precision = nullcontext() if dtype is None or is_sharded(base) else in_higher_precision(base, dtype)
    with with_attention(base, attention), precision:
        return [_reference_row(base, torch.tensor([row], device=base.device)) for row in rows]


def _reference_row(base: Any, ids: Tensor) -> Tensor:
    if not is_causal_lm(base):
        return forward(trunk_of(base)[1], input_ids=ids, use_cache=False).last_hidden_state[0].double()
    logits = forward(base, input_ids=ids, use_cache=False).logits[0, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return token_logprobs(logits, ids[0, 1:]).double()


def _differences(values: Tensor, expected: Tensor) -> Tensor:
    """The error of each of the row's last len(values) tokens: in nats for log-probabilities, relative for hidden states."""
    expected = expected[-len(values) :].to(values.device)
    errors = (values.double() - expected).abs()
    if errors.dim() > 1:
        errors = errors.norm(dim=-1) / expected.norm(dim=-1)
    return torch.nan_to_num(errors, nan=float("inf"))


# --- the passes --------------------------------------------------------------------------------------------------


def _run(base: Any, path: Paths) -> tuple[list[Ids], list[list[Tensor]]]:
    """Rows of tokens, and the values that the sampler, trainer and scorer of this path give for them."""
    rows = probe_rows(base.config.get_text_config().vocab_size)
    if not is_causal_lm(base):
        return rows, [_hidden_states(base, rows, [range(len(row)) for row in rows])]
    rows, sampled = _sample(base, rows)
    states = _hidden_states(base, rows, [range(len(row) - 1) for row in rows])
    logits = head_of(base)(torch.cat(states)).split([len(row) - 1 for row in rows])
    trained = [token_logprobs(x, torch.tensor(row[1:], device=x.device)) for x, row in zip(logits, rows, strict=True)]
    return rows, [sampled, trained, *([_score(base, rows)] if path.prefix_tree else [])]


def _sample(base: Any, prompts: list[Ids]) -> tuple[list[Ids], list[Tensor]]:
    """The prompts with the sampler's tokens, and their log-probabilities. The first row ends before the others."""
    uniforms = torch.rand((len(prompts), SAMPLED), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [first] = decode(base, prompts[:1], uniforms[:1], max_tokens=3, temperature=1.0, end=set())
    completions = decode(base, prompts, uniforms, max_tokens=SAMPLED, temperature=1.0, end={first.ids[-1]})
    rows = [
        prompt + completion.ids + ([] if completion.end is None else [completion.end])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return rows, [torch.tensor(completion.logprobs, dtype=torch.float64) for completion in completions]


def _hidden_states(base: Any, rows: list[Ids], ranges: list[range]) -> list[Tensor]:
    """The trainers' last hidden states of these tokens of each row."""
    layout = lay_out(base, rows, pad=0)
    return list(layout.gather(layout.hidden_states(base), ranges).split([len(r) for r in ranges]))


def _score(base: Any, rows: list[Ids]) -> list[Tensor]:
    """The scorer's log-probabilities of all tokens of each row but the first."""
    logprobs: dict[int, Tensor] = {}
    for picked, logits in prefix_scorer(base, 3072)([Row(row[:-1], 0) for row in rows]):
        for i, row_logits in zip(picked, logits.split([len(rows[i]) - 1 for i in picked]), strict=True):
            logprobs[i] = token_logprobs(row_logits, torch.tensor(rows[i][1:], device=logits.device))
    return [logprobs[i] for i in range(len(rows))]
