"""A transformers model in this process: the embedded default."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

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

REQUESTS = 4096  # score requests looked at together
CACHED_TOKENS = (
    32_768  # tokens of prompts and answers that are held at once; a token takes 46 kB in SmolLM2, as float32
)


class LocalEngine:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        weights: str,
        system: str | None = DEFAULT_SYSTEM,
        batch_size: int = 64,
        score_tokens: int = 3072,
        share: bool = True,
    ) -> None:
        """weights: fingerprint of the weights. score_tokens: tokens a scoring batch may hold, padding included.

        share: compute what score requests begin alike with once, where the model's attention allows it.
        """
        self.model, self.tokenizer, self.system = model.eval(), tokenizer, system
        self.name, self.batch_size, self.score_tokens = name, batch_size, score_tokens
        self.fingerprint = fingerprint("local", weights, template_fingerprint(tokenizer, system), str(model.dtype))
        self.usage = Usage()
        self.limit = context_limit(model.config, tokenizer)
        self.prepare(share)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def prepare(self, share: bool = True) -> None:
        """Ask which paths the model has proved."""
        self.paths: Paths = paths_of(self.model)
        self._tree = prefix_scorer(self.model, self.score_tokens) if share else None

    @classmethod
    def load(cls, spec: str, *, dtype: str = "auto", **options: Any) -> LocalEngine:
        """spec: what `--model` takes, less servers."""
        model, tokenizer = load_causal_lm(spec, dtype=dtype)
        return cls(model, tokenizer, name=spec, weights=model_fingerprint(spec), **options)

    def ids(self, chat: Any, prefix: str = "") -> list[int]:
        return chat_ids(self.tokenizer, chat, system=self.system, prefix=prefix)

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
        encoded.sort(key=lambda pair: len(pair[1]))  # alike lengths together: little padding
        for batch in self._batches(encoded, sampling.max_tokens):
            uniforms = torch.stack([_uniforms(r, sampling.max_tokens) for r, _ in batch])
            made = decode(
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
            for (request, ids), out in zip(batch, made, strict=True):
                text, only_reasoning = answer_text(self.tokenizer, out.ids)
                tokens = len(out.ids) + int(out.ended)
                self.usage.add(1, len(ids), tokens)
                why = None
                if only_reasoning and not out.ended:
                    why = f"cut inside its reasoning after {tokens} tokens; allow more (max_tokens)"
                yield Completion(request.id, text, out.ended, len(ids), tokens, why)

    def _batches(
        self, encoded: list[tuple[GenerationRequest, list[int]]], room: int
    ) -> Iterator[list[tuple[GenerationRequest, list[int]]]]:
        """Requests sampled together, shortest first: as many as the batch size and the cache's memory allow."""
        batch: list[tuple[GenerationRequest, list[int]]] = []
        for request, ids in encoded:
            full = len(batch) == self.batch_size or (len(ids) + room) * (len(batch) + 1) > CACHED_TOKENS
            if batch and full:
                yield batch
                batch = []
            batch.append((request, ids))
        if batch:
            yield batch

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Requests that begin alike share that work, whether or not they come one after another."""
        left = iter(requests)
        while asked := list(islice(left, REQUESTS)):
            yield from self._score(asked)

    def _score(self, asked: Sequence[ScoreRequest]) -> Iterator[Scores]:
        rows: list[Row] = []
        wanted: list[tuple[int, int, list[int]]] = []  # of each row: request, continuation, its tokens
        failed: dict[int, str] = {}
        for i, request in enumerate(asked):
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
                wanted.append((i, j, tail))
            self.usage.add(1, len(options.context), 0)
        found: list[list[float | None]] = [[None] * len(r.continuations) for r in asked]
        for picked, logits in self._logits(rows):
            lengths = [len(wanted[r][2]) for r in picked]
            targets = torch.tensor([t for r in picked for t in wanted[r][2]], device=logits.device)
            logits = logits.float()
            logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
            for r, each in zip(picked, logprobs.cpu().split(lengths), strict=True):
                total = each.sum().item()
                found[wanted[r][0]][wanted[r][1]] = total if math.isfinite(total) else None
        for i, (request, logs) in enumerate(zip(asked, found, strict=True)):
            yield Scores(request.id, tuple(logs), failed.get(i))

    def _logits(self, rows: list[Row]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices into rows, their logits at the asked positions one after another, (positions, vocabulary))."""
        short = [i for i, row in enumerate(rows) if self._tree is not None and self.paths.fits(len(row.ids))]
        if self._tree is not None and short:
            for picked, logits in self._tree([rows[i] for i in short]):
                yield [short[i] for i in picked], logits
        order = sorted(
            set(range(len(rows))) - set(short), key=lambda i: len(rows[i].ids)
        )  # alike lengths: little padding
        for picked in _by_tokens(order, rows, self.score_tokens):
            yield picked, self._row_logits([rows[r] for r in picked])

    @torch.no_grad()
    def _row_logits(self, rows: list[Row]) -> Tensor:
        """Each row computed by itself, (positions, vocabulary)."""
        layout = Layout(self.model, [r.ids for r in rows], self._pad)
        states = layout.gather(layout.hidden_states(self.model), [range(r.first, len(r.ids)) for r in rows])
        return head_of(self.model)(states)

    def close(self) -> None:
        """Give the memory back."""
        self.model = self._tree = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _uniforms(request: GenerationRequest, n: int) -> Tensor:
    seed = int(fingerprint("sample", request.id, request.seed), 16) % (2**63)
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_tokens(order: list[int], rows: list[Row], limit: int) -> Iterator[list[int]]:
    """Batches of rows sorted by length whose padded size stays under `limit` tokens."""
    batch: list[int] = []
    for r in order:
        if batch and len(rows[r].ids) * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(r)
    if batch:
        yield batch
