"""Training a reward model: Bradley–Terry on soft labels.

The loss is the cross-entropy of P(chosen is better) against the judge's probability. A label of 0.5 therefore pulls the two
scores together and teaches no preference (Bai et al. 2022, section 4.1: soft labels work better than hard ones).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solon.errors import Diverged, InputError
from solon.models.batching import distinct_tokens
from solon.models.forward import base_of
from solon.models.loading import load_checked
from solon.models.lora import add_adapters
from solon.models.passes import stored_lower_blocks
from solon.models.paths import record_path
from solon.models.settings import AdapterSettings
from solon.models.sharding import place_model
from solon.models.weights import (
    check_vocabulary,
    device,
    directory_of,
    load_tokenizer,
    model_fingerprint,
    resolve_dtype,
)
from solon.records import Chat, Comparison
from solon.reinforcement.reward_members import ADAPTERS, HEAD, NORMALISATION, Member
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.settings import RewardSettings
from solon.training.loop import Losses, all_passes, encode_all, fit_in_parts, learned_rows
from solon.training.saving import save_adapter, save_merged
from solon.training.settings import Progress

HEAD_RATE = 10  # the new head learns this many times as fast as the adapters
TIE = 1e-6  # a label this near to 0.5 is a tie


def preference_loss(
    chosen: Tensor, rejected: Tensor, label: Tensor, margin: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Weighted mean cross-entropy of sigmoid(chosen - rejected) against the soft label. Returns a scalar, nats per pair.

    chosen, rejected: scores, (pairs,). label: P(chosen is better), (pairs,). weight: of each pair, (pairs,).
    margin: how far the chosen score must exceed the rejected one for a label of 1 (Touvron et al. 2023, arXiv 2307.09288,
    section 3.2.2). The margin is scaled by 2 label - 1, so a tie has none, and swapping the two sides swaps its sign.
    """
    difference = chosen - rejected - margin * (2 * label - 1)
    losses = F.binary_cross_entropy_with_logits(difference, label, reduction="none")
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def beginnings_loss(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    differs: Sequence[int],
    label: Tensor,
    weight: Tensor,
    margin: float = 0.0,
) -> Tensor:
    """`preference_loss` of the beginnings of two responses with the same number of tokens, a mean over the numbers of tokens.

    chosen, rejected: for each pair, the scores after each token, (tokens,); an ended response keeps its last score. differs: for
    each pair, the index of the first token that differs; beginnings without a difference are not compared.
    """
    losses = []
    for a, b, first, target in zip(chosen, rejected, differs, label, strict=True):
        n = max(len(a), len(b))
        difference = (_extended(a, n) - _extended(b, n))[first:] - margin * (2 * target - 1)
        if len(difference):
            losses.append(F.binary_cross_entropy_with_logits(difference, target.expand(len(difference))))
        else:  # equal responses
            losses.append(0 * a[-1])
    return (torch.stack(losses) * weight).sum() / weight.sum()


def _extended(scores: Tensor, n: int) -> Tensor:
    """The scores, with the last one repeated up to n."""
    return torch.cat([scores, scores[-1:].expand(n - len(scores))])


@dataclass(frozen=True)
class Example:
    """A comparison as token ids. label: P(chosen is better). weight: in the loss."""

    chosen: list[int]
    rejected: list[int]
    start: int  # the index at which both responses begin
    label: float
    weight: float

    def opening(self, n: int) -> Example:
        """The comparison of the first n tokens of each response."""
        return replace(self, chosen=self.chosen[: self.start + n], rejected=self.rejected[: self.start + n])

    @property
    def differs(self) -> int:
        """The index of the first token that differs, counted from the start of the responses."""
        pairs = zip(self.chosen[self.start :], self.rejected[self.start :], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        return min(len(self.chosen), len(self.rejected)) - self.start if same is None else same


def train_reward_model(
    comparisons: Sequence[Comparison],
    model: str,
    out: Path,
    *,
    settings: RewardSettings,
    adapter: AdapterSettings | None,
    system: str | None,
    reference: Sequence[Chat],
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on the comparisons that have a label (abstentions are left out), and write the reward model to `out`.

    model: the causal language model to start from. adapter: None trains all weights. reference: conversations that end in
    a response, on which the scores are normalised. Returns counts, and losses of member 0 in nats per pair. Raises
    InputError where no comparison is left to learn from, and Diverged where no finite weights can be written.
    """
    if adapter is None and settings.members > 1:
        raise InputError("reward_model.members: an ensemble is made of adapters; give an adapter, or set members to 1")
    labelled = [c for c in comparisons if c.label is not None and settings.weights.get(c.labeler, 1.0)]
    decided = [c for c in labelled if settings.ties == "equal" or abs(float(c.label or 0) - 0.5) > TIE]
    if not decided:
        raise InputError("no comparison is left to learn from: each one is an abstention, a tie, or of weight 0")
    rewards = _new_reward_model(model, adapter, system, dtype)
    limit = rewards.limit.at_most(settings.max_length, "max_length")

    def encode(c: Comparison) -> Example:
        (chosen, start), (rejected, other) = (
            rewards.ids_and_start((*c.prompt, *side), limit) for side in (c.chosen, c.rejected)
        )
        weight = settings.weights.get(c.labeler, 1.0)
        start = min(start, other, len(chosen) - 1, len(rejected) - 1)  # an empty response may have no token at all
        return Example(chosen, rejected, start, float(c.label or 0), weight)

    examples, left_out = encode_all("comparison", decided, encode)
    reference_rows = [rewards.ids(c) for c in reference if rewards.unfit(c) is None]
    normalisation: list[dict[str, float]] = []
    losses: list[Losses] = []
    with tempfile.TemporaryDirectory(prefix="solon-reward-", ignore_cleanup_errors=True) as scratch:
        for n in reversed(range(settings.members)):  # member 0 last: it is on the trunk when the model is written
            losses.insert(0, _train_member(rewards, n, examples, settings, adapter, seed + n, progress))
            normalisation.insert(0, _normalise(rewards, reference_rows, out))
            if adapter:
                save_adapter(rewards.model, Path(scratch, str(n)))
                if n:
                    rewards.model = rewards.model.unload()
        base = model if adapter else None
        _save(rewards, normalisation, len(reference_rows), settings, base, out, scratch)
    stopped = next((member.stopped for member in reversed(losses) if member.stopped), None)
    return {
        "comparisons": len(learned_rows(examples, settings, seed)),
        "left_out": left_out,
        "abstained": sum(c.label is None for c in comparisons),
        "ties_skipped": len(labelled) - len(decided),
        "steps": sum(member.steps for member in losses),
        "tokens": settings.members
        * (_tokens(all_passes(examples, settings, seed)) + _opening_tokens(examples, settings)),
        **losses[0].to_json(),
        **({"stopped": stopped} if stopped else {}),
        "reference_mean": normalisation[0]["mean"],
        "reference_std": normalisation[0]["std"],
    }


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(e.chosen) + len(e.rejected) for e in examples)


def _opening_tokens(examples: Sequence[Example], settings: RewardSettings) -> int:
    if not settings.opening_tokens:
        return 0
    return settings.opening_epochs * _tokens([e.opening(settings.opening_tokens) for e in examples])


def _new_reward_model(model: str, adapter: AdapterSettings | None, system: str | None, dtype: str) -> RewardModel:
    """The causal language model with an untrained head in place of its scores over the vocabulary."""
    from transformers import AutoModelForSequenceClassification

    where = directory_of(model)
    tokenizer = load_tokenizer(where)
    classifier: Any = load_checked(
        AutoModelForSequenceClassification,
        where,
        new=[HEAD],
        extra=["lm_head."],  # in the files, and not in a classifier
        num_labels=1,
        dtype=resolve_dtype(dtype, where, "training") if adapter else torch.float32,
    )
    check_vocabulary(classifier, tokenizer)
    classifier = place_model(classifier, device()) if adapter else classifier.to(device())
    classifier.config.pad_token_id = tokenizer.pad_token_id
    record_path(model, classifier, where)
    return RewardModel(classifier, tokenizer, system, [Member(classifier.score)])


def _train_member(
    rewards: RewardModel, n: int, examples: Sequence[Example], settings: RewardSettings,
    adapter: AdapterSettings | None, seed: int, progress: Progress | None,
) -> Losses:  # fmt: skip
    """Train member n on the bare trunk that `rewards` holds; `rewards` then holds the trained member."""
    torch.manual_seed(seed)
    torch.nn.init.zeros_(rewards.model.score.weight)  # at first no response is better than another
    if adapter:
        rewards.model = add_adapters(rewards.model, adapter, task="SEQ_CLS")
    head = base_of(rewards.model).score.float()
    rewards.members = [Member(head)]

    openings = [e.opening(settings.opening_tokens) for e in examples if settings.opening_tokens]
    rewards.lower = stored_lower_blocks(rewards.model, _tokens([*examples, *openings]), rewards.tokenizer.pad_token_id)

    def loss(batch: Sequence[Example]) -> Tensor:
        rows, n = [e.chosen for e in batch] + [e.rejected for e in batch], len(batch)
        first = [
            e.start if settings.beginnings else len(row) - 1 for e, row in zip([*batch, *batch], rows, strict=True)
        ]
        scores = rewards.read(rows, first)
        whole = torch.stack([x[-1] for x in scores])
        label = torch.tensor([e.label for e in batch], device=whole.device)
        weight = torch.tensor([e.weight for e in batch], device=whole.device)
        of_whole = preference_loss(whole[:n], whole[n:], label, settings.margin, weight)
        if not settings.beginnings:
            return of_whole
        of_beginnings = beginnings_loss(
            scores[:n], scores[n:], [e.differs for e in batch], label, weight, settings.margin
        )
        return (1 - settings.beginnings) * of_whole + settings.beginnings * of_beginnings

    def member_progress(step: int, steps: int, shown: dict[str, float]) -> None:
        if progress:
            progress((settings.members - 1 - n) * steps + step, settings.members * steps, shown)

    learned = [(name, p) for name, p in rewards.model.named_parameters() if p.requires_grad]
    head_parameters = [p for name, p in learned if "score" in name]
    losses = fit_in_parts(
        examples,
        lambda e: e.opening(settings.opening_tokens),
        loss,
        lambda: [
            {"params": [p for name, p in learned if "score" not in name]},
            {"params": head_parameters, "lr": settings.learning_rate * HEAD_RATE},
        ],
        settings=settings,
        tokens=lambda e: distinct_tokens([e.chosen, e.rejected]),
        weight=lambda e: e.weight,
        seed=seed,
        progress=member_progress,
    )
    rewards.lower = None
    rewards.model.eval()
    return losses


def _normalise(rewards: RewardModel, rows: Sequence[list[int]], out: Path) -> dict[str, float]:
    """Mean and standard deviation of the raw scores of the reference rows. Raises Diverged where a score is not finite."""
    raw = torch.tensor(rewards.raw_scores(rows)) if rows else torch.tensor([-1.0, 1.0])
    if not torch.isfinite(raw).all():
        raise Diverged(f"{out}: not written, because the trained model gives scores that are not finite")
    return {"mean": raw.mean().item(), "std": max(raw.std().item(), 1e-6) if len(raw) > 1 else 1.0}


def _save(
    rewards: RewardModel, normalisation: list[dict[str, float]], reference_responses: int, settings: RewardSettings,
    base: str | None, out: Path, adapters: str,
) -> None:  # fmt: skip
    """Write the reward model. base: the model that the adapters in the directory `adapters` belong to; None: no adapters."""
    facts = {
        **normalisation[0],
        "reference_responses": reference_responses,
        "system": rewards.system,
        "base": model_fingerprint(base) if base else None,
        "members": normalisation,
        "uncertainty_penalty": settings.uncertainty_penalty,
        "beginnings": settings.beginnings > 0,
    }

    def add_files(directory: Path) -> None:
        (directory / NORMALISATION).write_text(json.dumps(facts, indent=1))
        if base:
            shutil.copytree(adapters, directory / ADAPTERS)

    save_merged(rewards.model, rewards.tokenizer, out, directory_of(base) if base else None, add_files)
