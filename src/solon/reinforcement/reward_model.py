"""The reward model: Bradley–Terry on soft labels.

A sequence classifier with one output reads a whole conversation and gives a score; P(chosen is better) is the
sigmoid of the difference of two scores. The loss is the cross-entropy against the judge's probability, so a label
of 0.5 pulls the two scores together and teaches no preference (Bai et al. 2022, section 4.1: soft labels work
better than hard ones). After training the scores are shifted and scaled to mean 0 and standard deviation 1 on
reference responses: KL coefficients then mean the same for every reward model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solon.engines.chat import chat_ids_and_turns
from solon.engines.decoding import ATTENTION
from solon.engines.weights import device, load_tokenizer, resolve, resolve_dtype
from solon.errors import InputError
from solon.records import Chat, Comparison
from solon.training import (
    AdapterSettings,
    Progress,
    TrainSettings,
    add_adapters,
    base_of,
    first_and_last,
    fit,
    hidden_states,
    right_pad,
    save_merged,
)

NORMALISATION = "solon_reward.json"
HEAD_RATE = 10  # the new head learns this many times as fast as the adapters


def preference_loss(chosen: Tensor, rejected: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy of sigmoid(chosen - rejected) against the soft label.

    chosen, rejected: scores, (pairs,). label: P(chosen is better), (pairs,). Returns a scalar, nats.
    """
    return F.binary_cross_entropy_with_logits(chosen - rejected, label)


class RewardModel:
    """Scores conversations. `mean` and `std` are those of the raw score on the reference responses."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, mean: float = 0.0, std: float = 1.0) -> None:
        self.model, self.tokenizer, self.system, self.mean, self.std = model, tokenizer, system, mean, std
        self.model.config.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def load(cls, where: str, dtype: str = "auto") -> RewardModel:
        from transformers import AutoModelForSequenceClassification

        path = Path(where) / NORMALISATION
        if not path.is_file():
            raise InputError(f"{where}: not a reward model written by Solon (no {NORMALISATION} in it)")
        kept = json.loads(path.read_text())
        model = AutoModelForSequenceClassification.from_pretrained(
            where, dtype=resolve_dtype(dtype), attn_implementation=ATTENTION, use_safetensors=True
        ).to(device())
        model.score.float()  # the trunk may be bfloat16; the score is not rounded
        return cls(model.eval(), load_tokenizer(where), kept["system"], kept["mean"], kept["std"])

    def ids(self, conversation: Chat, max_length: int = 1024) -> list[int]:
        """Token ids of a conversation that ends with the assistant's turn, up to its end-of-turn token.

        Too long a conversation loses its beginning: the response is what is scored.
        """
        ids, spans = chat_ids_and_turns(self.tokenizer, conversation, system=self.system)
        return ids[: spans[-1][1]][-max_length:]

    def raw(self, rows: Sequence[list[int]]) -> Tensor:
        """Raw scores, (rows,), float32, read at each row's last token. Padding on the right, found by length.

        The classifier's own head looks for the last token that is not the pad token, which is the wrong place
        where pad = eos; so Solon reads the place itself.
        """
        at = self.model.device
        ids, mask, last = right_pad(rows, self.tokenizer.pad_token_id, at)
        hidden = hidden_states(self.model, input_ids=ids, attention_mask=mask)
        return base_of(self.model).score(hidden[torch.arange(len(rows), device=at), last].float()).squeeze(-1).float()

    @torch.no_grad()
    def score(self, conversations: Sequence[Chat], batch_size: int = 32) -> list[float]:
        """Normalised scores, in the order given."""
        return [(raw - self.mean) / self.std for raw in self.raw_scores(conversations, batch_size)]

    @torch.no_grad()
    def raw_scores(self, conversations: Sequence[Chat], batch_size: int = 32) -> list[float]:
        rows = [self.ids(c) for c in conversations]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, value in zip(batch, self.raw([rows[i] for i in batch]).tolist(), strict=True):
                out[i] = value
        return out


def accuracy(chosen: Iterable[float], rejected: Iterable[float]) -> float:
    """Share of pairs whose chosen response scores higher; an equal score counts one half."""
    pairs = list(zip(chosen, rejected, strict=True))
    return sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in pairs) / len(pairs)


def score_pairs(model: RewardModel, comparisons: Sequence[Comparison]) -> tuple[list[float], list[float]]:
    """Normalised scores of the chosen and of the rejected responses."""
    both = model.score([(*c.prompt, *c.chosen) for c in comparisons] + [(*c.prompt, *c.rejected) for c in comparisons])
    return both[: len(comparisons)], both[len(comparisons) :]


def train_reward_model(
    comparisons: Sequence[Comparison],
    model: str,
    out: Path,
    *,
    settings: TrainSettings,
    adapter: AdapterSettings | None,
    system: str | None,
    reference: Sequence[Chat],
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on comparisons that carry a label (abstentions are left out); write the model to `out`.

    model: the causal LM to start from. reference: conversations ending in a response, on which the score is
    normalised. Returns counts and losses (nats per pair).
    """
    from transformers import AutoModelForSequenceClassification

    labelled = [c for c in comparisons if c.label is not None]
    if not labelled:
        raise ValueError("no comparison carries a label")
    where = resolve(model)
    tokenizer = load_tokenizer(where)
    torch.manual_seed(seed)
    lm = AutoModelForSequenceClassification.from_pretrained(
        where,
        num_labels=1,
        dtype=resolve_dtype(dtype) if adapter else torch.float32,
        attn_implementation=ATTENTION,
        use_safetensors=True,
    ).to(device())
    torch.nn.init.zeros_(lm.score.weight)  # every response starts at 0: no preference before the first label
    if adapter:
        lm = add_adapters(lm, adapter, task="SEQ_CLS")
    base_of(lm).score.float()
    rewards = RewardModel(lm, tokenizer, system)
    head = [p for n, p in lm.named_parameters() if p.requires_grad and "score" in n]
    rest = [p for n, p in lm.named_parameters() if p.requires_grad and "score" not in n]
    encoded = [
        (
            rewards.ids((*c.prompt, *c.chosen), settings.max_length),
            rewards.ids((*c.prompt, *c.rejected), settings.max_length),
            float(c.label),  # type: ignore[arg-type]
        )
        for c in labelled
    ]

    def loss(batch: Sequence[Any]) -> Tensor:
        scores = rewards.raw([b[0] for b in batch] + [b[1] for b in batch])
        label = torch.tensor([b[2] for b in batch], device=scores.device)
        return preference_loss(scores[: len(batch)], scores[len(batch) :], label)

    lm.train()
    losses = fit(
        encoded,
        loss,
        [{"params": rest}, {"params": head, "lr": settings.learning_rate * HEAD_RATE}],
        settings=settings,
        length=lambda row: max(len(row[0]), len(row[1])),
        seed=seed,
        progress=progress,
    )
    lm.eval()
    raw = torch.tensor(rewards.raw_scores(reference)) if reference else torch.tensor([0.0, 1.0])
    mean, std = raw.mean().item(), max(raw.std().item(), 1e-6)
    save_merged(lm, tokenizer, out, base=where if adapter else None)
    normalisation = {"mean": mean, "std": std, "reference_responses": len(reference), "system": system}
    (out / NORMALISATION).write_text(json.dumps(normalisation))
    return {
        "comparisons": len(labelled),
        "abstained": len(comparisons) - len(labelled),
        "steps": len(losses),
        "tokens": settings.epochs * sum(len(a) + len(b) for a, b, _ in encoded),
        **first_and_last(losses),
        "reference_mean": mean,
        "reference_std": std,
    }
