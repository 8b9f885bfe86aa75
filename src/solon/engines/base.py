"""The one seam: where text and log-probabilities come from.

Two verbs, `generate` and `score`, and a count of what they used. A stage never asks which engine it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from solon.errors import InputError
from solon.records import Chat


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 96
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # of tokens that stand in the prompt or the text so far (Keskar et al. 2019)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:  # not nan either
                raise InputError(f"{name}: {value}: expected a finite number, 0 or more")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GenerationRequest:
    id: str
    chat: Chat
    seed: int = 0  # this request's own randomness: its text does not depend on its neighbours' seeds


@dataclass(frozen=True)
class Completion:
    id: str
    text: str
    ended: bool  # True: ended by itself; False: cut at max_tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # the engine could not answer; `text` is then empty
    again: bool = False  # the error may pass (a server out of reach, a time limit): asked again on resume


@dataclass(frozen=True)
class Question:
    """What a score request asks, as a typed question (System One), for engines that answer those and no chats.

    choice: which option; score: which level, lowest first; noul: yes or no. criteria: what each continuation of the
    request stands for, one each, in their order; for noul they are those of yes and no and may be empty.
    """

    kind: Literal["choice", "score", "noul"]
    state: Any  # JSON: what is judged, told apart from what is asked
    instructions: str
    criteria: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreRequest:
    """`chat` up to the assistant's turn, whose first words are `prefix`; then one of `continuations` and `suffix`.

    suffix closes the answer: with it, "1" is not the beginning of "10".
    """

    id: str
    chat: Chat
    continuations: tuple[str, ...]
    prefix: str = ""
    suffix: str = ""
    question: Question | None = None


@dataclass(frozen=True)
class Scores:
    id: str
    # Natural log. None: the engine could not tell. Minus infinite: it says exactly 0, as one that rounds does.
    logprobs: tuple[float | None, ...]
    error: str | None = None
    again: bool = False  # the error may pass (a server out of reach, a time limit): asked again on resume


@dataclass(frozen=True)
class Failure:
    """Why nothing was made of one item. `id` is the item's."""

    id: str
    reason: str
    again: bool = False  # it may pass: the item is asked again when the work is resumed


OnFailure = Callable[[Failure], None]


@dataclass
class Usage:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = 0.0  # None: the price of this model is not known
    book: Callable[[int, int, int, float | None], None] | None = None  # called with all that is added, as it happens

    def add(self, requests: int, prompt_tokens: int, completion_tokens: int, cost_usd: float | None = 0.0) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost_usd = None if self.cost_usd is None or cost_usd is None else self.cost_usd + cost_usd
        if self.book:
            self.book(requests, prompt_tokens, completion_tokens, cost_usd)


class Engine(Protocol):
    name: str  # what the user called the model

    @property
    def fingerprint(self) -> str:
        """Changes when the weights or the chat template do."""
        ...

    @property
    def usage(self) -> Usage: ...

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        """Complete each chat. Completions come in any order of finishing, each with its request's id."""
        ...

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each continuation after the chat and the prefix."""
        ...


@dataclass
class ScriptedEngine:
    """An engine for tests: `reply` writes the completions, `prefer` the log-probabilities."""

    reply: Any = None  # Callable[[GenerationRequest], str]
    prefer: Any = None  # Callable[[ScoreRequest], tuple[float | None, ...]]
    name: str = "scripted"
    fingerprint: str = "scripted"
    usage: Usage = field(default_factory=Usage)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.usage.add(1, 0, 0)
            yield Completion(request.id, self.reply(request), ended=True)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        for request in requests:
            self.usage.add(1, 0, 0)
            yield Scores(request.id, tuple(self.prefer(request)))
