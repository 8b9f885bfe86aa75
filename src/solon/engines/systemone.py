"""A decision model behind an endpoint: the System One API, or OpenAI's Decisions API.

`systemone:MODEL@http://host:port/v1` asks POST …/v1/systemone (`transformers serve`, Ollama, llama.cpp, vendors);
an address that ends in /decisions, as in `systemone:gpt-6-luna@https://api.openai.com/v1/decisions`, is asked in the
form of that API (OpenAI). The soft label is then the service's answer itself: no letters are looked for in text.

One question a request, for the reason given in `decision.py`. What is left out, and why: images; and SGLang's
/v1/decisions was not at hand to be tested against.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
from openai import AsyncOpenAI
from pydantic import BaseModel, Field, ValidationError

from solon.engines.base import Completion, GenerationRequest, Question, Sampling, ScoreRequest, Scores
from solon.engines.decision import NAME, NOT_TYPED, distribution, logs, no_text, probabilities, typed
from solon.engines.endpoint import Endpoint, Failed, key_for, parse_spec, price_usd, where
from solon.records import fingerprint

PROBE = Question("noul", "Hello.", "Is this a greeting?")


class _Cached(BaseModel):
    cached_tokens: int | None = Field(default=None, ge=0)


class _Used(BaseModel):
    input_tokens: int | None = Field(default=None, ge=0)
    output_tokens: int | None = Field(default=None, ge=0)
    input_tokens_details: _Cached | None = None

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Input tokens, those of them read from a cache, output tokens; 0 where not told."""
        read, details = self.input_tokens or 0, self.input_tokens_details
        return read, min((details and details.cached_tokens) or 0, read), self.output_tokens or 0


class _Answer(BaseModel):
    """What Solon reads of an answer; services differ in the rest, and it is let be."""

    answers: dict[str, Any] | list[Any]
    model: str | None = None
    usage: _Used | None = None


class SystemOneEngine(Endpoint):
    kind = "systemone"
    answers = "one of decisions"

    def __init__(self, model: str, base_url: str, **options: Any) -> None:
        """options: as `Endpoint` takes them. base_url: with /systemone or /decisions at its end, or with neither."""
        base, _, last = base_url.rpartition("/")
        self.path = last if last in ("systemone", "decisions") else "systemone"
        super().__init__(model, base if last == self.path else base_url, **options)
        self.name = f"{self.kind}:{model}@{base_url}"
        self.serves = f"decisions at {self.path}"
        self._version: str | None = None  # what the service calls the model that answered: jev-1.13.0 for jev-latest
        self._answered = False

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> SystemOneEngine:
        return cls.load(spec)

    @classmethod
    def load(cls, spec: str, **options: Any) -> SystemOneEngine:
        """spec: `systemone:MODEL@URL`. The key comes from the environment (`key_for`). Connects to nothing yet.

        Raises InputError for a malformed spec.
        """
        model, base_url = parse_spec(spec, cls.kind)
        return cls(model, base_url, key=key_for(base_url), **options)

    @property
    def fingerprint(self) -> str:
        """Of the model's name, the service's host and API, and what the service calls the model that answers.

        The last is known from the first answer on. Where there was none yet, one question is asked, so that the first
        record of a run has the fingerprint of the last.
        """
        if not self._answered:
            list(self.score([ScoreRequest("fingerprint", (), ("yes", "no"), question=PROBE)]))
        return fingerprint("systemone", self.model, urlsplit(self.base_url).netloc, self.path, self._version)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        raise no_text(self.name)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each continuation's option. A request that finally fails is a Scores with `error`.

        Raises InputError where no request could succeed: a refused key, an unknown model, a redirect, and a server
        that was never reached.
        """

        async def read(client: AsyncOpenAI, request: ScoreRequest) -> Scores:
            try:
                if request.question is None:
                    raise Failed(NOT_TYPED)
                found = await self._ask(client, request.question, request.continuations)
            except Failed as error:
                return Scores(request.id, (None,) * len(request.continuations), str(error), error.again)
            return Scores(request.id, logs(found))

        return self._stream(list(requests), read)

    async def _ask(self, client: AsyncOpenAI, question: Question, names: tuple[str, ...]) -> list[float]:
        """P of each option. Raises as `Endpoint._post`."""
        decisions = self.path == "decisions"
        body = {"model": self.model, **(_decisions(question, names) if decisions else _systemone(question, names))}

        post: Any = client.post

        def call() -> Any:
            options = {"headers": self._headers()}
            return post(f"/{self.path}", cast_to=httpx2.Response, body=body, options=options)

        try:
            answer = _Answer.model_validate(await self._post(call))
        except ValidationError as error:
            raise Failed(f"the server's answer is not one of decisions ({where(error)})") from None
        if not self._answered:
            self._answered, self._version = True, answer.model
        read, cached, written = (answer.usage or _Used()).tokens
        cost = None if answer.usage is None else price_usd(self.model, self.base_url, read, written, cached)
        self._count(0, read, written, cost)
        try:
            if decisions:
                return _of_decisions(question, names, answer.answers)
            if not isinstance(answer.answers, dict) or answer.answers.get(NAME) is None:
                raise ValueError("the question is not among the answers")
            return probabilities(question, names, answer.answers[NAME])
        except ValueError as error:
            raise Failed(f"the decision model could not answer: {error}") from None


def _systemone(question: Question, names: tuple[str, ...]) -> dict[str, Any]:
    return {"state": question.state, "questions": {NAME: typed(question, names)}}


def _decisions(question: Question, names: tuple[str, ...]) -> dict[str, Any]:
    """The same as OpenAI's API takes it."""
    asked: dict[str, Any] = {"name": NAME, "instructions": question.instructions}
    if question.kind == "choice":
        choices = zip(names, question.criteria, strict=True)
        asked |= {"type": "choice", "choices": [{"value": n, "description": text} for n, text in choices]}
    elif question.kind == "score":
        asked |= {"type": "score", "levels": [{"label": text} for text in question.criteria]}
    else:  # it takes no descriptions of yes and no
        said = "".join(f"\n{n}: {c}" for n, c in zip(("Yes", "No"), question.criteria, strict=False))
        asked |= {"type": "predicate", "instructions": question.instructions + said}
    state = question.state
    text = state if isinstance(state, str) else json.dumps(state, ensure_ascii=False)
    return {"input": text, "questions": [asked]}


def _of_decisions(question: Question, names: tuple[str, ...], answers: Any) -> list[float]:
    if not isinstance(answers, list) or len(answers) != 1 or not isinstance(answers[0], dict):
        raise ValueError("there is not one answer to one question")
    answer = answers[0]
    if answer.get("type") == "refusal":
        raise ValueError("it refused")
    try:
        if question.kind == "noul":
            found = [float(answer["probability"]), 1 - float(answer["probability"])]
        else:
            keys = names if question.kind == "choice" else range(len(question.criteria))
            told = {p["value"]: float(p["probability"]) for p in answer["probabilities"]}
            found = [told[key] for key in keys]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is not one to a {question.kind} question ({type(error).__name__})") from None
    return distribution(found)


ENGINE = SystemOneEngine
