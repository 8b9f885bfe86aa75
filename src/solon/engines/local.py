"""A transformers model in this process. This engine is the default."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest, Scores, Usage
from solon.errors import Unfit
from solon.models.batching import Row
from solon.models.chat.encode import answer_text, chat_ids, end_ids, option_ids, template_fingerprint
from solon.models.chat.limits import context_limit
from solon.models.decoding import decode
from solon.models.head import head_of
from solon.models.passes import prefix_scorer
from solon.models.paths import Paths, paths_of
from solon.models.plain import Layout
from solon.models.weights import load_causal_lm, model_fingerprint
from solon.records import fingerprint
from solon.settings import DEFAULT_SYSTEM

REQUESTS = 4096  # score requests that are prepared together
CACHED_TOKENS = 32_768  # tokens of prompts and answers whose keys and values are in memory at once
T = TypeVar("T")


class LocalEngine:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        weights: str,
        system: str | None = DEFAULT_SYSTEM,
        batch_size: int = 256,
        score_tokens: int = 3072,
        share: bool = True,
    ) -> None:
        """weights: fingerprint of the weights. score_tokens: tokens of a scoring batch at most, padding included.

        share: compute the common beginning of score requests once, where the model's attention allows it.
        """
        self.model, self.tokenizer, self.system = model.eval(), tokenizer, system
        self.name, self.batch_size, self.score_tokens = name, batch_size, score_tokens
        self.fingerprint = fingerprint("local", weights, template_fingerprint(tokenizer, system), str(model.dtype))
        self.usage = Usage()
        self.limit = context_limit(model.config, tokenizer)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.prepare(share)

    def prepare(self, share: bool = True) -> None:
        """Choose the forward passes that the model has proved."""
        self.paths: Paths = paths_of(self.model)
        self._tree = prefix_scorer(self.model, self.score_tokens) if share else None

    @classmethod
    def load(cls, spec: str, *, dtype: str = "auto", **options: Any) -> LocalEngine:
        """spec: a value of `--model` that names a model in this process. options: as `__init__` takes them."""
        model, tokenizer = load_causal_lm(spec, dtype=dtype)
        return cls(model, tokenizer, name=spec, weights=model_fingerprint(spec), **options)

    def ids(self, chat: Any) -> list[int]:
        return chat_ids(self.tokenizer, chat, system=self.system)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        limit = self.limit.less(sampling.max_tokens, "the answer")
        encoded: list[tuple[GenerationRequest, list[int]]] = []
        for request in requests:
            try:
                ids = chat_ids(self.tokenizer, request.chat, system=self.system, limit=limit)
            except Unfit as error:
                yield Completion(request.id, "", ended=False, error=str(error))
            else:
                encoded.append((request, ids))
        encoded.sort(key=lambda pair: len(pair[1]))  # similar lengths in one batch need little padding
        for batch in self._batches(encoded, sampling.max_tokens):
            uniforms = torch.stack([_uniforms(r, sampling.max_tokens) for r, _ in batch])
            completions = decode(
                self.model,
                [ids for _, ids in batch],
                uniforms,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                end=end_ids(self.tokenizer),
                pad=self._pad,
            )
            for (request, ids), out in zip(batch, completions, strict=True):
                text, only_reasoning = answer_text(self.tokenizer, out.ids)
                tokens = len(out.ids) + int(out.ended)
                self.usage.add(1, len(ids), tokens)
                reason = None
                if only_reasoning and not out.ended:
                    reason = f"cut inside its reasoning after {tokens} tokens; allow more (max_tokens)"
                yield Completion(request.id, text, out.ended, len(ids), tokens, reason)

    def _batches(
        self, encoded: Sequence[tuple[GenerationRequest, list[int]]], max_tokens: int
    ) -> Iterator[list[tuple[GenerationRequest, list[int]]]]:
        """Requests that are sampled together: as many as the batch size and the memory of the cache allow."""
        return _by_tokens(encoded, lambda pair: len(pair[1]) + max_tokens, CACHED_TOKENS, most=self.batch_size)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each continuation. Requests share the work for a common beginning, in any order."""
        remaining = iter(requests)
        while window := list(islice(remaining, REQUESTS)):
            yield from self._score(window)

    def _score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        rows: list[Row] = []
        targets: list[tuple[int, int, list[int]]] = []  # of each row: (request, continuation, its tokens)
        failed: dict[int, str] = {}
        for i, request in enumerate(requests):
            try:
                options = option_ids(
                    self.tokenizer, request.chat, request.continuations,
                    system=self.system, prefix=request.prefix, suffix=request.suffix, limit=self.limit,
                )  # fmt: skip
            except Unfit as error:
                failed[i] = str(error)
                continue
            for j, tail in enumerate(options.tails):
                rows.append(Row(options.context + tail[:-1], len(options.context) - 1))
                targets.append((i, j, tail))
            self.usage.add(1, len(options.context), 0)
        results: list[list[float | None]] = [[None] * len(r.continuations) for r in requests]
        for picked, logits in self._logits(rows):
            tails = [targets[r][2] for r in picked]
            tokens = torch.tensor([t for tail in tails for t in tail], device=logits.device)
            logits = logits.float()
            logprobs = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
            for r, row_logprobs in zip(picked, logprobs.cpu().split([len(tail) for tail in tails]), strict=True):
                request_index, continuation, _ = targets[r]
                total = row_logprobs.sum().item()
                results[request_index][continuation] = total if math.isfinite(total) else None
        for i, (request, row) in enumerate(zip(requests, results, strict=True)):
            yield Scores(request.id, tuple(row), failed.get(i))

    def _logits(self, rows: list[Row]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices into rows, the logits at the scored positions of these rows in order, (positions, vocabulary))."""
        short = [i for i, row in enumerate(rows) if self._tree is not None and self.paths.fits(len(row.ids))]
        if self._tree is not None and short:
            for picked, logits in self._tree([rows[i] for i in short]):
                yield [short[i] for i in picked], logits
        # similar lengths in one batch need little padding
        order = sorted(set(range(len(rows))) - set(short), key=lambda i: len(rows[i].ids))
        for picked in _by_tokens(order, lambda i: len(rows[i].ids), self.score_tokens):
            yield picked, self._row_logits([rows[r] for r in picked])

    @torch.no_grad()
    def _row_logits(self, rows: list[Row]) -> Tensor:
        """Logits of rows that share no work, (positions, vocabulary)."""
        layout = Layout(self.model, [r.ids for r in rows], self._pad)
        hidden = layout.gather(layout.hidden_states(self.model), [range(r.first, len(r.ids)) for r in rows])
        return head_of(self.model)(hidden)

    def close(self) -> None:
        """Free the memory of the model."""
        self.model = self._tree = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _uniforms(request: GenerationRequest, n: int) -> Tensor:
    """The n random numbers of one request, in [0, 1), float64. The other requests of the batch do not change them."""
    seed = int(fingerprint("sample", request.id, request.seed), 16) % (2**63)
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_tokens(
    items: Iterable[T], tokens: Callable[[T], int], limit: int, *, most: float = math.inf
) -> Iterator[list[T]]:
    """Batches of items sorted by tokens: at most `limit` tokens after padding, and at most `most` items.

    An item that exceeds the limit alone is a batch of one.
    """
    batch: list[T] = []
    for item in items:
        if batch and (len(batch) == most or tokens(item) * (len(batch) + 1) > limit):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
