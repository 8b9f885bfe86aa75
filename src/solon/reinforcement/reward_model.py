"""The reward model: a sequence classifier with one output, which reads a conversation and gives a score.

P(chosen is better) is the sigmoid of the difference of two scores (Bradley–Terry). Scores are normalised: they have mean 0
and standard deviation 1 on reference responses, so a KL coefficient means the same for every reward model.

Several members with different seeds are an ensemble. Where the members disagree, the score can be lowered
(Coste et al. 2024, arXiv 2310.02743). `reward_training.py` trains a reward model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.errors import Unfit
from solon.models.batching import split_rows
from solon.models.chat.encode import chat_ids_and_turns
from solon.models.chat.limits import Limit, context_limit
from solon.models.loading import explain_errors, load_checked
from solon.models.passes import hidden_states_from
from solon.models.paths import record_path
from solon.models.sharding import is_sharded
from solon.models.weights import device, load_tokenizer, model_fingerprint, resolve_dtype
from solon.records import Chat, Comparison
from solon.reinforcement.reward_members import (
    ADAPTERS,
    Member,
    active_adapter,
    attach_members,
    read_normalisation,
    unmerge_adapter,
)

TOKENS_AT_ONCE = 4096  # distinct tokens of a pass that only scores


class RewardModel:
    """Scores conversations, in standard deviations of the scores of the reference responses."""

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None, members: Sequence[Member], penalty: float = 0.0
    ) -> None:
        """penalty: standard deviations between the members that are subtracted from their mean."""
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.members, self.penalty = list(members), penalty
        self.limit = context_limit(model.config, tokenizer)
        self.lower: Any = None  # a policy's lower blocks, where this model shares them

    @classmethod
    def load(cls, where: str, dtype: str = "auto", on: str | None = None) -> RewardModel:
        """Load the directory of a reward model. on: the torch device; None: the device of this process.

        Raises InputError where Solon did not write the directory, or a file in it is damaged.
        """
        from transformers import AutoModelForSequenceClassification

        facts, wanted = read_normalisation(where), resolve_dtype(dtype, where)
        # Members share the trunk, so the merged adapter must go. In bfloat16, rounding would lose a part of that adapter.
        apart = (Path(where) / ADAPTERS).is_dir() and (wanted != torch.float32 or len(facts["members"]) > 1)
        model: Any = load_checked(AutoModelForSequenceClassification, where, dtype=torch.float32 if apart else wanted)
        tokenizer, target = load_tokenizer(where), torch.device(on) if on else device()
        model.config.pad_token_id = tokenizer.pad_token_id
        if apart:
            explain_errors(_broken(where), lambda: unmerge_adapter(model, Path(where) / ADAPTERS / "0"))
            for p in model.parameters():  # not the buffers: rotary frequencies stay exact
                p.data = p.data.to(wanted)
        record_path(where, model.to(target), where)
        if apart:
            model, members = explain_errors(_broken(where), lambda: attach_members(model, where, facts, "member"))
        else:
            model.eval().score.float()  # the trunk may be bfloat16, and the score is not rounded
            members = [Member(model.score, **facts["members"][0])]
        return cls(model, tokenizer, facts["system"], members, facts["uncertainty_penalty"])

    @classmethod
    def load_on_policy(cls, policy: Any, tokenizer: Any, where: str, model: str) -> RewardModel | None:
        """The reward model as adapters on the policy's trunk; None where it was trained from another model than `model`.

        policy: a PEFT model, made from `model`. No second set of weights is held.
        """
        facts = read_normalisation(where)
        if facts["base"] is None or facts["base"] != model_fingerprint(model):
            return None
        trunk, members = explain_errors(_broken(where), lambda: attach_members(policy, where, facts, "reward"))
        return cls(trunk, tokenizer, facts["system"], members, facts["uncertainty_penalty"])

    def share_lower_blocks(self, lower: Any) -> None:
        """Use a policy's lower blocks, where this model is adapters on that policy and has no adapter in those blocks."""
        if lower and lower.serves(self.model, [m.adapter or "" for m in self.members]):
            self.lower = lower

    def ids(self, conversation: Chat, limit: Limit | None = None) -> list[int]:
        """Token ids of a conversation that ends with an assistant's turn, up to the end-of-turn token of that turn.

        limit: None: the model's context. Raises Unfit where the conversation is longer. It is never cut: without its
        beginning it would lose the system message, and without its end the response.
        """
        return self.ids_and_start(conversation, limit)[0]

    def ids_and_start(self, conversation: Chat, limit: Limit | None = None) -> tuple[list[int], int]:
        """`ids`, and the index at which the last turn begins."""
        limit = limit or self.limit
        ids, spans = chat_ids_and_turns(self.tokenizer, conversation, system=self.system, limit=limit)
        start, end = spans[-1]
        limit.check(end)
        return ids[:end], start

    def unfit(self, conversation: Chat) -> str | None:
        """Why the model cannot score a conversation; None where it can."""
        try:
            self.ids(conversation)
        except Unfit as error:
            return str(error)
        return None

    def forward(self, rows: Sequence[list[int]], member: int = 0) -> Tensor:
        """Raw scores of rows of token ids in one pass, (rows,), float32. The score is read at a row's last token.

        The classifier's own head looks for the last token that is not the pad token. Where pad = eos, that is another
        token, so Solon selects the position.
        """
        return torch.cat(self.read(rows, [len(row) - 1 for row in rows], member))

    def read(self, rows: Sequence[list[int]], first: Sequence[int], member: int = 0) -> list[Tensor]:
        """For each row, the raw scores after each token from index `first` on, in one pass, (tokens,), float32.

        The score after the last token is the score of the row. Earlier ones are scores of its beginnings, and mean something
        where the reward model has learned beginnings.
        """
        part = self.members[member]
        with active_adapter(self.model, part.adapter):
            states_of = self.lower.hidden_states if self.lower else None
            hidden_states = hidden_states_from(self.model, rows, first, self.tokenizer.pad_token_id, states_of)
        scores: Tensor = part.head(hidden_states.float()).squeeze(-1).float()
        return list(torch.split(scores, [len(row) - start for row, start in zip(rows, first, strict=True)]))

    def raw_scores(self, rows: Sequence[list[int]], member: int = 0) -> list[float]:
        """Raw scores of rows of token ids, in the order given, in passes that fit into memory."""
        return [scores[0] for scores in self._read_all(rows, [len(row) - 1 for row in rows], member)]

    @torch.no_grad()
    def _read_all(self, rows: Sequence[list[int]], first: Sequence[int], member: int) -> list[list[float]]:
        """`read` in passes that fit into memory."""
        scores: list[list[float]] = [[]] * len(rows)
        if self.lower:
            self.lower.add(rows)
        parts = split_rows(rows, TOKENS_AT_ONCE)
        for part, _ in distributed.synchronised_steps(parts, parts[0] if parts else [], is_sharded(self.model)):
            values = self.read([rows[i] for i in part], [first[i] for i in part], member)
            for i, value in zip(part, values, strict=True):
                scores[i] = value.tolist()
        return scores

    def of_beginnings(self, rows: Sequence[list[int]], first: Sequence[int]) -> list[list[float]]:
        """For each row of token ids, its score after each token from index `first` on, as `score` gives the last one."""
        by_member = [
            [[(raw - m.mean) / m.std for raw in scores] for scores in self._read_all(rows, first, n)]
            for n, m in enumerate(self.members)
        ]
        return [[self._together(scores) for scores in zip(*row, strict=True)] for row in zip(*by_member, strict=True)]

    def score(self, conversations: Sequence[Chat]) -> list[float]:
        """Normalised scores, in the order given: the mean over members, minus the penalty for their disagreement."""
        return [self._together(scores) for scores in self.by_member(conversations)]

    def _together(self, scores: Sequence[float]) -> float:
        """The mean of the members' scores, minus the penalty for their disagreement."""
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        return statistics.fmean(scores) - self.penalty * deviation

    def by_member(self, conversations: Sequence[Chat]) -> list[list[float]]:
        """For each conversation, the normalised score of each member."""
        rows = [self.ids(c) for c in conversations]
        columns = [[(raw - m.mean) / m.std for raw in self.raw_scores(rows, n)] for n, m in enumerate(self.members)]
        return [list(scores) for scores in zip(*columns, strict=True)]

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[float]:
        """For each comparison P(chosen is better), 0..1: the mean over members."""
        rows = [self.ids((*c.prompt, *c.chosen)) for c in comparisons]
        rows += [self.ids((*c.prompt, *c.rejected)) for c in comparisons]
        raw = torch.tensor([self.raw_scores(rows, n) for n in range(len(self.members))])  # (members, rows)
        n = len(comparisons)
        return (raw[:, :n] - raw[:, n:]).sigmoid().mean(0).tolist()


def _broken(where: str) -> str:
    return f"{where}: its members cannot be loaded"
