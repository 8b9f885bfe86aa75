"""The interface between stages and models: `generate` writes text, `score` gives log-probabilities, `usage` counts both.

A stage does not ask which engine it has.
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
    repetition_penalty: float = 1.0  # for tokens in the prompt or the text so far (Keskar et al. 2019)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < math.inf:  # nan also fails the comparison
                raise InputError(f"{name}: {value}: expected a finite number, 0 or more")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GenerationRequest:
    id: str
    chat: Chat
    seed: int = 0  # of this request alone: the text does not depend on the other requests


@dataclass(frozen=True)
class Completion:
    id: str
    text: str
    ended: bool  # True: the model ended the text; False: the text was cut at max_tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # why the engine could not answer; `text` is then empty
    again: bool = False  # the error may pass (a server out of reach, a time limit), so a resumed run asks again


@dataclass(frozen=True)
class Question:
    """A score request as a typed question (System One), for engines that answer typed questions and no chats.

    choice: which option; score: which level, the lowest first; noul: yes or no. criteria: one description per
    continuation of the request, in the same order. For noul they describe yes and no and may be empty.
    """

    kind: Literal["choice", "score", "noul"]
    state: Any  # JSON: the material to judge, separate from the instructions
    instructions: str
    criteria: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreRequest:
    """The text to score: `chat`, then the assistant's turn as `prefix`, one of `continuations`, and `suffix`.

    suffix closes the answer, so that "1" is not the beginning of "10".
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
    # Natural log. None: the engine gives no value. Minus infinity: the engine says exactly 0, because it rounds.
    logprobs: tuple[float | None, ...]
    error: str | None = None
    again: bool = False  # as in Completion


@dataclass(frozen=True)
class Failure:
    """The reason for an item without a result. `id` is the id of the item."""

    id: str
    reason: str
    again: bool = False  # as in Completion


OnFailure = Callable[[Failure], None]


@dataclass
class Usage:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = 0.0  # None: the price of this model is unknown
    book: Callable[[int, int, int, float | None], None] | None = None  # called with the arguments of each `add`

    def add(self, requests: int, prompt_tokens: int, completion_tokens: int, cost_usd: float | None = 0.0) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost_usd = None if self.cost_usd is None or cost_usd is None else self.cost_usd + cost_usd
        if self.book:
            self.book(requests, prompt_tokens, completion_tokens, cost_usd)


class Engine(Protocol):
    name: str  # the value of `--model`

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the weights and with the chat template."""
        ...

    @property
    def usage(self) -> Usage: ...

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        """Complete each chat. Completions come in the order of finishing, each with the id of its request."""
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
