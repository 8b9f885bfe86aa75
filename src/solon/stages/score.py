"""Scores of a reward model for a file of conversations, pairs or comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from solon.data import read_demonstrations, read_pairs
from solon.data.readers import first_line
from solon.engines import Failure, OnFailure
from solon.records import Chat, Pair, SFTExample, assistant
from solon.runs.options import DTYPE, JSON, LIMIT, OUT, QUIET, REQUIRED, RESTART, REWARD_MODEL, SEED, Option, Verb

if TYPE_CHECKING:
    from solon.runs.call import Call


class ScoredExample(SFTExample):
    score: float  # in standard deviations of the reward model's reference


class ScoredPair(Pair):
    scores: tuple[float, float]  # of the two responses


class Score(Verb):
    """Reward-model scores: one per conversation, or one per side of a pair.

    Example: `solon score --reward-model reward --input pairs.jsonl --out scores.jsonl`
    """

    name = "score"
    takes = (
        REWARD_MODEL, OUT,
        Option("input_", str, REQUIRED, "A file of conversations (TRL `messages`), pairs or comparisons.", flag="--input"),
    )  # fmt: skip
    common = (DTYPE, LIMIT, RESTART, SEED, QUIET, JSON)

    def run(self, call: Call) -> None:
        from solon.engines.identity import decided_dtype, of_model
        from solon.reinforcement.reward_model import RewardModel

        where, name = call["reward_model"], call["input_"]
        loaded: list[RewardModel] = []

        def make(batch: Sequence[Any], failed: OnFailure) -> Iterator[ScoredExample | ScoredPair]:
            if not loaded:
                loaded.append(RewardModel.load(where, dtype))
            chats: list[Chat] = []
            readable: list[Any] = []
            for item in batch:
                sides = [(*item.prompt, assistant(text)) for text in item.responses] if sided else [item.messages]
                if why := next(filter(None, map(loaded[0].unfit, sides)), None):
                    failed(Failure(item.id, why))
                else:
                    readable.append(item)
                    chats += sides
            scores = loaded[0].score(chats)
            for n, item in enumerate(readable):
                if sided:
                    yield ScoredPair(**dict(item), scores=(scores[2 * n], scores[2 * n + 1]))
                else:
                    yield ScoredExample(**dict(item), score=scores[n])

        with call.file([where, name]) as target:
            sided = any(key in first_line(name) for key in ("chosen", "responses"))
            items: list[Any] = (read_pairs(name) if sided else read_demonstrations(name))[: call.limit]
            dtype = decided_dtype(call.dtype, target.identity, where)
            kind: Any = ScoredPair if sided else ScoredExample
            outcome = call.records(
                target, lambda: items, make, kind, identity={"reward_model": of_model(where), "dtype": dtype},
                batch_size=256, noun="scores",
            )  # fmt: skip
        call.end(outcome, "scores")
