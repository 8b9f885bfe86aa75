"""A transformers model in this process: the embedded default."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest, Scores, Usage
from solon.engines.chat import chat_ids, end_ids, template_fingerprint, text_ids
from solon.engines.decoding import decode, left_pad
from solon.engines.weights import load_causal_lm, model_fingerprint
from solon.records import fingerprint

DEFAULT_SYSTEM = "You are a helpful assistant."


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
        score_tokens: int = 8192,
    ) -> None:
        """weights: fingerprint of the weights. score_tokens: padded tokens a scoring batch may hold."""
        self.model, self.tokenizer, self.system = model.eval(), tokenizer, system
        self.name, self.batch_size, self.score_tokens = name, batch_size, score_tokens
        self.fingerprint = fingerprint("local", weights, template_fingerprint(tokenizer, system), str(model.dtype))
        self.usage = Usage()
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @classmethod
    def load(cls, spec: str, *, dtype: str = "auto", **options: Any) -> LocalEngine:
        """spec: what `--model` takes, less servers."""
        model, tokenizer = load_causal_lm(spec, dtype=dtype)
        return cls(model, tokenizer, name=spec, weights=model_fingerprint(spec), **options)

    def ids(self, chat: Any, prefix: str = "") -> list[int]:
        return chat_ids(self.tokenizer, chat, system=self.system, prefix=prefix)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        encoded = [(r, self.ids(r.chat)) for r in requests]
        encoded.sort(key=lambda pair: len(pair[1]))  # alike lengths together: little padding
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
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
                text = self.tokenizer.decode(out.ids, skip_special_tokens=True).strip()
                tokens = len(out.ids) + int(out.ended)
                self.usage.add(1, len(ids), tokens)
                yield Completion(request.id, text, out.ended, len(ids), tokens)

    @torch.no_grad()
    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        rows: list[tuple[int, int, list[int], int]] = []  # request, continuation, ids, continuation length
        asked = list(requests)
        for i, request in enumerate(asked):
            context = self.ids(request.chat, request.prefix)
            tails = [text_ids(self.tokenizer, c) for c in request.continuations]
            if all(len(t) == 1 for t in tails):
                rows.append((i, -1, context, 1))  # one pass serves every option
            else:
                rows += [(i, j, context + t, len(t)) for j, t in enumerate(tails)]
            self.usage.add(1, len(context), 0)
        rows.sort(key=lambda row: len(row[2]))
        found: dict[int, dict[int, float]] = {i: {} for i in range(len(asked))}
        for batch in _by_tokens(rows, self.score_tokens):
            keep = max(length for *_, length in batch) + 1
            logits = self._last_logits([ids for _, _, ids, _ in batch], keep)
            for (i, j, ids, length), row in zip(batch, logits, strict=True):
                if j < 0:
                    logprobs = row[-1].float().log_softmax(-1)
                    for k, continuation in enumerate(asked[i].continuations):
                        found[i][k] = logprobs[text_ids(self.tokenizer, continuation)[0]].item()
                else:
                    logprobs = row[-length - 1 : -1].float().log_softmax(-1)
                    target = torch.tensor(ids[-length:], device=row.device).unsqueeze(-1)
                    found[i][j] = logprobs.gather(-1, target).sum().item()
        for i, request in enumerate(asked):
            yield Scores(request.id, tuple(found[i][k] for k in range(len(request.continuations))))

    def _last_logits(self, rows: list[list[int]], keep: int) -> Tensor:
        ids, mask = left_pad(rows, self._pad, self.model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
        ).logits

    def close(self) -> None:
        """Give the memory back."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _uniforms(request: GenerationRequest, n: int) -> Tensor:
    seed = int(fingerprint("sample", request.id, request.seed), 16) % (2**63)
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_tokens(rows: list[Any], limit: int) -> Iterator[list[Any]]:
    """Batches of rows sorted by length whose padded size stays under `limit` tokens."""
    batch: list[Any] = []
    for row in rows:
        if batch and len(row[2]) * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
