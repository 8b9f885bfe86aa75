"""Every record that flows between stages, and its JSON form.

Records are immutable: a stage reads records and returns new ones. `meta` holds the fingerprints of the constitution, the
prompt templates and the model, the sampling settings and the seed. The files follow the field's formats (TRL
conversational and preference), so other tools open them.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_jsonable_python

Source = Literal["red_team", "helpful"]
Labeler = Literal["ai", "human"]
# Strict: neither "0.7" nor true is a probability; and nan lies in no range.
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]
LogOdds = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits of the SHA-256 of the canonical JSON of `parts`: equal content, equal fingerprint."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values, which read back equal. A field is left out where its value and default are None."""
        return {
            name: _json(value)
            for name, field in type(self).model_fields.items()
            if (value := getattr(self, name)) is not None or field.is_required() or field.default is not None
        }


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: str


Chat = tuple[Message, ...]


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


class Prompt(Record):
    """A conversation that ends with the user's turn."""

    prompt: Chat
    source: Source | None = None
    id: str = ""
    tags: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if isinstance(data.get("prompt"), str):
                data["prompt"] = [{"role": "user", "content": data["prompt"]}]
            if not data.get("id"):
                data["id"] = fingerprint("prompt", _plain(data.get("prompt")))
        return data

    @model_validator(mode="after")
    def _ends_with_user(self) -> Prompt:
        if not self.prompt or self.prompt[-1].role != "user":
            raise ValueError("a prompt must end with a user turn")
        if not self.prompt[-1].content.strip():
            raise ValueError("the last user turn is empty")
        return self


class RevisionStep(Record):
    principle: str  # the principle's id
    critique: str  # empty where the revision was direct, without a critique
    revision: str


class RevisionChain(Record):
    """response → (critique → revision) once per step. `id` is the prompt's id."""

    id: str
    prompt: Chat
    response: str
    steps: tuple[RevisionStep, ...]
    source: Source | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


CUT_TO_SENTENCE = "cut_to_sentence"  # in the meta of an example: its answer was cut after a sentence, and would go on


class SFTExample(Record):
    """TRL's conversational form: the loss falls on the assistant turns named in `train_turns` (default: the last)."""

    messages: Chat
    id: str = ""
    source: Source | None = None
    train_turns: tuple[Annotated[int, Field(strict=True)], ...] | None = None  # indices into messages
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _learnable_turns(self) -> SFTExample:
        for turn in self.train_turns or ():
            if not 0 <= turn < len(self.messages):
                raise ValueError(f"train_turns: {turn}: there are {len(self.messages)} messages, counted from 0")
            if self.messages[turn].role != "assistant":
                raise ValueError(
                    f"train_turns: message {turn} is the {self.messages[turn].role}'s, not the assistant's"
                )
        if self.train_turns == ():
            raise ValueError("train_turns: is empty, so there is nothing to learn; leave it out for the last answer")
        return self


class Pair(Record):
    """Two responses to one prompt, not yet compared."""

    id: str
    prompt: Chat
    responses: tuple[str, str]
    source: Source | None = None
    authors: tuple[str, str] | None = None  # the models that wrote them, where known
    human: Probability | None = None  # P(first is better) as people see it, where known
    meta: dict[str, Any] = Field(default_factory=dict)


class Candidates(Record):
    """Two or more responses to one prompt, not yet ranked."""

    id: str
    prompt: Chat
    responses: tuple[str, ...] = Field(min_length=2)
    source: Source | None = None
    authors: tuple[str, ...] | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


class Judgement(Record):
    """One principle's judgement of a pair: P(first response is better), with the first response shown first and second.

    `None` is an abstention in that order, with its reason in `abstained`; an abstention never becomes a label. The
    probabilities round to 0 and 1 where a judge is sure, so labels are made of the log-odds. Records of other tools, and
    Solon's before 26 November 2026, have only the probabilities.
    """

    principle: str
    forward: Probability | None
    swapped: Probability | None  # also P(first response is better), with the first response shown second
    forward_log_odds: LogOdds | None = None  # natural log of P / (1 - P)
    swapped_log_odds: LogOdds | None = None
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    rationale: str | None = None  # the judge's reasoning, first response shown first; "---" separates several samples
    rationale_swapped: str | None = None  # the reasoning with the first response shown second
    abstained: str | None = None
    # check: a verifiable principle, answered without a model; each: a model was asked of each response by itself. Both have no
    # order, so `forward` and `swapped` are equal.
    kind: Literal["model", "check", "each"] = "model"

    @model_validator(mode="before")
    @classmethod
    def _abstained_orders(cls, data: Any) -> Any:
        """Files of an older Solon leave out the order in which the judge abstained."""
        return {"forward": None, "swapped": None, **data} if isinstance(data, dict) else data


def turned(j: Judgement) -> Judgement:
    """The same judgement of the same pair, with the second response as its first.

    The two orders change places too: `forward` is always the one that shows the first response first.
    """
    return j.model_copy(
        update={
            "forward": _complement(j.swapped, j.swapped_log_odds),
            "swapped": _complement(j.forward, j.forward_log_odds),
            "forward_log_odds": None if j.swapped_log_odds is None else -j.swapped_log_odds,
            "swapped_log_odds": None if j.forward_log_odds is None else -j.forward_log_odds,
            "rationale": j.rationale_swapped,
            "rationale_swapped": j.rationale,
        }
    )


def _complement(p: float | None, log_odds: float | None) -> float | None:
    """1 - p, from the log-odds where they are known, which are exact near 0 and 1."""
    if p is None or log_odds is None:
        return None if p is None else 1 - p
    return 1 / (1 + math.exp(log_odds)) if log_odds < 0 else math.exp(-log_odds) / (1 + math.exp(-log_odds))


class Comparison(Record):
    """Two compared responses in TRL's preference form: `label` = P(chosen is better), 0..1.

    Where Solon made the label, `chosen` is the response that the label favours. `first` keeps the order of the pair that
    was compared; `p_first` and `first_log_odds` give the label in that order.
    """

    id: str
    prompt: Chat
    chosen: Chat
    rejected: Chat
    label: Probability | None  # None only where abstained
    first: Literal["chosen", "rejected"] = "chosen"  # which of the two was the first response of the pair
    log_odds: LogOdds | None = None  # of a soft label by a judge, which rounds to 1 where the judge is sure
    abstained: bool = False
    judgements: tuple[Judgement, ...] = ()
    labeler: Labeler = "ai"
    source: Source | None = None
    principle: str | None = None  # the principle that decided, where the labeler names it
    authors: tuple[str, str] | None = None  # the models that wrote chosen and rejected, where known
    human: Probability | None = None  # P(chosen is better) as people see it, where known
    meta: dict[str, Any] = Field(default_factory=dict)

    @property
    def p_first(self) -> float | None:
        """P(the first response of the pair is better); None where the judge abstained."""
        return self.label if self.label is None or self.first == "chosen" else 1 - self.label

    @property
    def better_and_worse(self) -> tuple[Chat, Chat] | None:
        """The better side, then the worse one; None for an abstention and for a tie."""
        if self.label is None or self.label == 0.5:
            return None
        return (self.chosen, self.rejected) if self.label > 0.5 else (self.rejected, self.chosen)

    @property
    def judgements_of_first(self) -> tuple[Judgement, ...]:
        """The judgements as P(the first response of the pair is better)."""
        return self.judgements if self.first == "chosen" else tuple(turned(j) for j in self.judgements)

    @property
    def responses(self) -> tuple[str, str]:
        """The two texts in the order of the pair."""
        texts = text_of(self.chosen), text_of(self.rejected)
        return texts if self.first == "chosen" else texts[::-1]


class Ranking(Record):
    """Responses to one prompt on one scale: P(i is better than j) = sigmoid(strengths[i] - strengths[j])."""

    id: str
    prompt: Chat
    responses: tuple[str, ...]
    strengths: tuple[float | None, ...]  # log-odds, mean 0; None where the judge abstained on the response
    order: tuple[int, ...]  # indices into responses, the best first
    comparisons: tuple[Comparison, ...] = ()
    source: Source | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


class Rating(Record):
    """The judge's rating of one response."""

    id: str
    prompt: Chat
    response: str
    rating: float | None  # 1 to 10, expected value over the judge's probabilities; None where the judge abstained
    by_principle: dict[str, float | None] = Field(default_factory=dict)
    abstained: str | None = None  # the reason of an abstention
    meta: dict[str, Any] = Field(default_factory=dict)


class RolloutSummary(Record):
    """One update as it is journalled: means over its rollouts. None where the algorithm (RLOO, GRPO, DPO) reports none."""

    update: int
    reward: float | None = None  # reward-model score, in units of its own standard deviation on the reference set
    kl_nats: float | None = None  # per response, policy against reference
    entropy_nats: float | None = None  # per token
    response_tokens: float | None = None
    clip_fraction: float | None = None
    policy_loss: float | None = None
    kl_coefficient: float
    ended: float | None = None  # share of responses that ended by themselves, 0..1
    value_loss: float | None = None
    approx_kl: float | None = None  # nats per token, mean over the steps: how far from the policy that sampled
    explained_variance: float | None = None  # of the returns by the values, 1 at best
    watched: dict[str, Any] = Field(default_factory=dict)  # measures of the rollouts' words (monitors.text_measures)
    check: dict[str, Any] | None = None  # of the probe prompts, where one was due (monitors.Check)
    meta: dict[str, Any] = Field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """The numbers for a tracker, by name."""
        values = self.model_dump(exclude={"update", "watched", "check", "meta"})
        values |= {f"rollouts/{k}": v for k, v in self.watched.items()}
        for name, value in (self.check or {}).items():
            values[f"check/{name}"] = value["value"] if isinstance(value, dict) and "value" in value else value
        return {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}  # True counts as 1


def text_of(chat: Chat) -> str:
    """The text of a one-message chat such as `Comparison.chosen`."""
    return chat[-1].content


def _json(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return to_jsonable_python(value)


def _plain(prompt: Any) -> Any:
    if isinstance(prompt, (list, tuple)):
        return [m.model_dump() if isinstance(m, Message) else m for m in prompt]
    return prompt
