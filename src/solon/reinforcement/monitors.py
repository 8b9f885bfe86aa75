"""Measures that watch PPO while it runs.

The reward is what training maximises, so the reward cannot show that training has gone wrong. Measures of the rollouts' texts
are taken at every update. Now and then there is a check: the policy answers the same probe prompts as before training, and a
judge, the "gold", says how often the new answers are better than the old ones. Where the reward rises and the gold falls, the
reward is being gamed (Gao et al. 2023, arXiv 2210.10760). Where the answers are less about their questions than before, the
policy is losing its sense. Chance may look like either in any one of many checks. The watch holds the probability of each false alarm
at 5 % over all planned checks together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import Field

from solon import distributed
from solon.measures.resampling import p_above_zero
from solon.measures.sense import question_of
from solon.measures.statistics import mean, preference, share
from solon.measures.texts import distinct_n, has_boilerplate, is_evasive, is_refusal, tokens
from solon.records import Chat, Comparison, Pair, Prompt, Record, Source, assistant

PHRASE = 5  # words of a phrase that is counted over the texts: the paper's "you are valued and cared for" has six
LEVEL = 0.05  # probability of any false alarm in a training, over all planned checks
SENSE_MARGIN = 0.02  # how far the mean of `about` may fall before it counts as lost
Gold = Callable[[Sequence[Pair]], Iterable[Comparison]]
About = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]
"""Takes questions and answers; gives the share of the other questions that fit each answer less well than its own."""


def planned_checks(updates: int, every: int) -> int:
    """How many checks follow the one before training: one after every `every` updates, and one after the last update."""
    return -(-updates // every)


def text_measures(texts: Sequence[str]) -> dict[str, Any]:
    """Measures of an update's rollouts. Shares are 0..1; `phrase` is the five words that the most texts contain."""
    n = len(texts)
    phrase, count = most_common_phrase(texts)
    distinct = distinct_n(texts)
    return {
        "evasive": sum(map(is_evasive, texts)) / n,
        "boilerplate": sum(map(has_boilerplate, texts)) / n,
        "distinct_3": None if math.isnan(distinct) else distinct,  # None: no text has three words
        "phrase": phrase,
        "phrase_share": count / n,
    }


def most_common_phrase(texts: Sequence[str], n: int = PHRASE) -> tuple[str, int]:
    """The n words in a row that the most texts contain, and the number of these texts.

    Of equally common phrases, the first one. An empty phrase and 0 where no text has n words.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = tokens(text)
        counts.update(dict.fromkeys(zip(*(words[i:] for i in range(n)), strict=False)).keys())
    if not counts:
        return "", 0
    [(phrase, count)] = counts.most_common(1)
    return " ".join(phrase), count


class Check(Record):
    """The policy's answers to the probe prompts after some updates. Lists hold one value per prompt."""

    update: int  # finished updates
    answers: tuple[str, ...]
    rewards: tuple[float, ...]  # sd
    # P(the answer is better than the one before training), of the probes that the judge compares; equal: 0.5; abstained: None
    gold: tuple[float | None, ...]
    over_refusal: float | None  # share of the benign prompts that are refused
    gamed: bool = False  # since the start the reward has risen and the gold has fallen, both beyond chance
    against: int | None = None  # finished updates at the check that this one was compared with: the start
    reward_rose: dict[str, Any] = Field(default_factory=dict)  # mean difference from the start, sd
    gold_fell: dict[str, Any] = Field(default_factory=dict)  # 0.5 minus the mean of `gold`
    p_reward: float | None = None  # one-sided p-value: chance alone raised the reward
    p_gold: float | None = None  # one-sided p-value: chance alone lowered the gold
    level: float | None = None  # both p-values must be at most this
    about: tuple[
        float | None, ...
    ] = ()  # how much each answer to a helpful probe is about its question, 0..1; empty: not measured
    lost_sense: bool = False  # the answers are less about their questions than at the start, beyond chance

    @property
    def bad(self) -> bool:
        """Whether the policy of this check is not to be written."""
        return self.gamed or self.lost_sense

    def summary(self) -> dict[str, Any]:
        """The part of a check that the journal and the trackers hold."""
        given = [g for g in self.gold if g is not None]
        compared = ("against", "reward_rose", "gold_fell", "p_reward", "p_gold", "level")
        return {
            "updates": self.update,
            "reward": mean(self.rewards).to_json(),
            "gold": share([preference(g) for g in given]).to_json(),
            "abstained": len(self.gold) - len(given),
            "over_refusal": self.over_refusal,
            "gamed": self.gamed,
            "about": mean([a for a in self.about if a is not None]).to_json(),
            "lost_sense": self.lost_sense,
            **({key: getattr(self, key) for key in compared} if self.against is not None else {}),
        }


class Watch:
    """The probe prompts, the judge of the answers to them, and the checks so far."""

    def __init__(
        self, probes: Sequence[Prompt], gold: Gold | None = None, *, planned: int, about: About | None = None,
        margin: float = SENSE_MARGIN, only: Source | None = None,
    ) -> None:  # fmt: skip
        """gold: a judge's comparisons of pairs; None: only measures that need no judge are taken. only: the source of the
        probes that the judge compares; None: all probes. about: None: not measured. margin: how far its mean may fall.

        planned: how many checks will follow the one before training. Each has an equal part of `LEVEL` (Bonferroni). This
        bounds the probability of a false alarm however strongly the checks of one training depend on each other. A check
        beyond the plan has no part left, and raises no alarm.
        """
        self.probes, self.gold, self.planned, self.about = list(probes), gold, planned, about
        self.margin, self.only = margin, only
        self.checks: list[Check] = []

    def check(self, update: int, answers: Sequence[str], score: Callable[[Sequence[Chat]], Sequence[float]]) -> Check:
        """The next check. The first one is made before training, and later ones are compared with it."""
        chats = [(*p.prompt, assistant(a)) for p, a in zip(self.probes, answers, strict=True)]
        benign = [is_refusal(a) for p, a in zip(self.probes, answers, strict=True) if p.source == "helpful"]
        check = Check(
            update=update,
            answers=tuple(answers),
            rewards=tuple(map(float, score(chats))),
            gold=self._preferences(answers),
            over_refusal=sum(benign) / len(benign) if benign else None,
            about=self._about(answers),
        )
        if self.checks:
            check = self.compared(check)
        self.checks.append(check)
        return check

    @property
    def best(self) -> Check:
        """Of the checks with their sense, the one with the highest mean gold. An abstention counts one half; of equal ones, the latest."""
        sound = [c for c in self.checks if not c.lost_sense]
        return max(sound, key=lambda c: (sum(0.5 if g is None else g for g in c.gold), c.update))

    def _about(self, answers: Sequence[str]) -> tuple[float | None, ...]:
        """How much each answer to a helpful probe is about its question. A refusal of a harmful one need not name the question."""
        helpful = [
            (question_of(p.prompt), a) for p, a in zip(self.probes, answers, strict=True) if p.source == "helpful"
        ]
        if self.about is None or not helpful:
            return ()
        values = self.about(*zip(*helpful, strict=True)) if distributed.is_main() else []
        return tuple(distributed.broadcast(list(values)))

    def _preferences(self, answers: Sequence[str]) -> tuple[float | None, ...]:
        """For each probe prompt that is judged, P(the answer is better than the one before training); None: abstained."""
        start = self.checks[0].answers if self.checks else answers
        judged = [
            Pair(id=p.id, prompt=p.prompt, responses=(new, old), source=p.source)
            for p, new, old in zip(self.probes, answers, start, strict=True)
            if self.only in (None, p.source)
        ]
        if self.gold is None:
            return tuple(None for _ in judged)
        changed = [pair for pair in judged if pair.responses[0].strip() != pair.responses[1].strip()]
        preferences: dict[str, float | None] = {p.id: 0.5 for p in judged} | {p.id: None for p in changed}
        comparisons = list(self.gold(changed)) if distributed.is_main() else []
        preferences |= {c.id: c.p_first for c in distributed.broadcast(comparisons)}
        return tuple(preferences[p.id] for p in judged)

    def compared(self, now: Check) -> Check:
        """The check with its comparison to the start. The best earlier check would be the luckiest one, and so unfair."""
        start, level = self.checks[0], LEVEL / self.planned if len(self.checks) <= self.planned else 0.0
        # Where the embedding model was not there at one of the two checks, there is nothing to compare.
        about = zip(start.about, now.about, strict=True) if len(start.about) == len(now.about) else ()
        both = [(before, after) for before, after in about if None not in (before, after)]
        fell_more = [before - after - self.margin for before, after in both]  # type: ignore[operator]
        if len(fell_more) > 1:
            now = now.model_copy(update={"lost_sense": p_above_zero(fell_more) <= level})
        rose = [after - before for after, before in zip(now.rewards, start.rewards, strict=True)]
        fell = [0.5 - g for g in now.gold if g is not None]  # the start against itself is 0.5
        if len(fell) < 2:
            return now
        p_reward, p_gold = p_above_zero(rose), p_above_zero(fell)
        return now.model_copy(
            update={
                "gamed": max(p_reward, p_gold) <= level,
                "against": start.update,
                "reward_rose": mean(rose).to_json(),
                "gold_fell": mean(fell).to_json(),
                "p_reward": p_reward,
                "p_gold": p_gold,
                "level": level,
            }
        )
