"""What PPO is watched by while it runs.

The reward says what training wants, so it cannot say when training has gone wrong. Beside it stand measures of the
rollouts' words, and every so often a check: the policy answers the same probe prompts as at the start, and a judge, the
"gold", says how often it prefers the new answers. Where the reward rises and the gold falls, the reward is being gamed
(Gao et al. 2023, arXiv 2210.10760).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import Field

from solon import processes
from solon.constitution import Constitution
from solon.engines import LazyEngine
from solon.evaluation.metrics import (
    bootstrap,
    bootstrap_difference,
    distinct_n,
    has_boilerplate,
    is_evasive,
    is_refusal,
    tokens,
)
from solon.feedback.judge import Judging, compare
from solon.records import Chat, Comparison, Pair, Prompt, Record, assistant, text_of

PHRASE = 5  # words of a phrase that many answers share: the paper's "you are valued and cared for" has six
Gold = Callable[[Sequence[Pair]], Iterable[Comparison]]


def judged_by(engine: LazyEngine, constitution: Constitution, how: Judging, seed: int) -> Gold:
    """A judge that is in memory only while it is asked."""

    def gold(pairs: Sequence[Pair]) -> list[Comparison]:
        with engine:
            return list(compare(pairs, engine, constitution, how, seed=seed))

    return gold


def of_texts(texts: Sequence[str]) -> dict[str, Any]:
    """Measures of an update's rollouts: shares 0..1; `phrase` is the five words that most of them hold."""
    n = len(texts)
    phrase, held = commonest(texts)
    return {
        "evasive": sum(map(is_evasive, texts)) / n,
        "boilerplate": sum(map(has_boilerplate, texts)) / n,
        "distinct_3": distinct_n(texts),
        "phrase": phrase,
        "phrase_share": held / n,
    }


def commonest(texts: Sequence[str], n: int = PHRASE) -> tuple[str, int]:
    """The run of n words that the most texts hold, and how many do; the first of equals. Empty where no text is that long."""
    found: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        said = tokens(text)
        found.update(list(dict.fromkeys(zip(*(said[i:] for i in range(n)), strict=False))))
    if not found:
        return "", 0
    words, held = max(found.items(), key=lambda item: item[1])
    return " ".join(words), held


class Check(Record):
    """The policy's answers to the probe prompts after some updates. Lists hold one value a prompt."""

    update: int  # updates done
    answers: tuple[str, ...]
    rewards: tuple[float, ...]
    gold: tuple[float | None, ...]  # P(the answer is better than the start's), 0.5 where equal; None: abstained
    over_refusal: float | None  # share of the benign prompts that are refused
    gamed: bool = False  # since the best check the reward has risen and the gold has fallen, both beyond chance
    against: int | None = None  # that best check's update
    reward_rose: dict[str, Any] = Field(default_factory=dict)
    gold_fell: dict[str, Any] = Field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What the journal and the trackers hold of it."""
        given = [g for g in self.gold if g is not None]
        return {
            "updates": self.update,
            "reward": bootstrap(self.rewards).to_json(),
            "gold": bootstrap(given).to_json(),
            "abstained": len(self.gold) - len(given),
            "over_refusal": self.over_refusal,
            "gamed": self.gamed,
            **(
                {"against": self.against, "reward_rose": self.reward_rose, "gold_fell": self.gold_fell}
                if self.against is not None
                else {}
            ),
        }


class Watch:
    """Asks the probe prompts again and again, and compares."""

    def __init__(self, probes: Sequence[Prompt], gold: Gold | None = None) -> None:
        """gold: a judge's comparisons of pairs. None: only what needs no judge is watched."""
        self.probes, self.gold = list(probes), gold
        self.checks: list[Check] = []

    def check(self, update: int, answers: Sequence[str], score: Callable[[Sequence[Chat]], Sequence[float]]) -> Check:
        """The next check; the first one is the start's own."""
        chats = [(*p.prompt, assistant(a)) for p, a in zip(self.probes, answers, strict=True)]
        benign = [is_refusal(a) for p, a in zip(self.probes, answers, strict=True) if p.source == "helpful"]
        found = Check(
            update=update,
            answers=tuple(answers),
            rewards=tuple(map(float, score(chats))),
            gold=self._preferred(answers),
            over_refusal=sum(benign) / len(benign) if benign else None,
        )
        if self.checks:
            found = self._compared(found)
        self.checks.append(found)
        return found

    @property
    def best(self) -> Check:
        """Of the highest gold, an abstention counting one half; the latest of equals."""
        return max(self.checks, key=lambda c: (_mean(c.gold), c.update))

    def _preferred(self, answers: Sequence[str]) -> tuple[float | None, ...]:
        start = self.checks[0].answers if self.checks else answers
        pairs = [
            Pair(id=p.id, prompt=p.prompt, responses=(new, old), source=p.source)
            for p, new, old in zip(self.probes, answers, start, strict=True)
            if new.strip() != old.strip()
        ]
        if self.gold is None:
            return tuple(None for _ in answers)
        found: dict[str, float | None] = {p.id: 0.5 for p in self.probes} | {p.id: None for p in pairs}
        new = {p.id: p.responses[0] for p in pairs}
        for c in processes.agreed(list(self.gold(pairs)) if processes.is_main() else []):
            if c.label is not None:
                found[c.id] = c.label if text_of(c.chosen) == new[c.id] else 1 - c.label
        return tuple(found[p.id] for p in self.probes)

    def _compared(self, now: Check) -> Check:
        best = self.best
        both = [i for i, (a, b) in enumerate(zip(now.gold, best.gold, strict=True)) if a is not None and b is not None]
        if len(both) < 2:
            return now
        sure = 1 - 0.05 / len(self.checks)  # the best of several noisy checks is the luckiest: Bonferroni
        rose = bootstrap_difference(now.rewards, best.rewards, confidence=sure)
        fell = bootstrap_difference(
            [best.gold[i] or 0.0 for i in both], [now.gold[i] or 0.0 for i in both], confidence=sure
        )
        gamed = all(x.low is not None and x.low > 0 for x in (rose, fell))
        return now.model_copy(
            update={"gamed": gamed, "against": best.update, "reward_rose": rose.to_json(), "gold_fell": fell.to_json()}
        )


def _mean(values: Sequence[float | None]) -> float:
    return sum(0.5 if v is None else v for v in values) / len(values)
