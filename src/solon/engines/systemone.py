"""A decision model behind an endpoint: the System One API, or OpenAI's Decisions API.

`systemone:MODEL@http://host:port/v1` sends POST …/v1/systemone (`transformers serve`, Ollama, llama.cpp, vendors). An address
that ends in /decisions, such as `systemone:gpt-6-luna@https://api.openai.com/v1/decisions`, gets requests in the form of that
API (OpenAI). The soft label is the probability in the service's answer: Solon looks for no letters in a text.

A request holds one question, for the reason given in `decision.py`. Images are left out. SGLang's /v1/decisions was not
tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
from openai import AsyncOpenAI

from solon.engines.base import Completion, GenerationRequest, Question, Sampling, ScoreRequest
from solon.engines.decision import NAME, NOT_TYPED, check_distribution, log_probabilities, no_text, probabilities, typed
from solon.engines.endpoint import Answer, Endpoint
from solon.engines.failures import Failed
from solon.records import fingerprint

PROBE = Question("noul", "Hello.", "Is this a greeting?")


class _Decisions(Answer):
    answers: dict[str, Any] | list[Any]
    model: str | None = None


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
        self._version: str | None = None  # the service's name of the model that answered: jev-1.13.0 for jev-latest

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> SystemOneEngine:
        return cls.load(spec)

    @property
    def fingerprint(self) -> str:
        """A hash of the model's name, the service's host and API, and the service's name of the model that answers.

        The first answer brings that name. Before any answer, Solon asks one question, so that the first record of a run
        has the fingerprint of the last record.
        """
        if not self._answered:
            list(self.score([ScoreRequest("fingerprint", (), ("yes", "no"), question=PROBE)]))
        return fingerprint("systemone", self.model, urlsplit(self.base_url).netloc, self.path, self._version)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        raise no_text(self.name)

    async def _score(self, client: AsyncOpenAI, request: ScoreRequest) -> tuple[tuple[float | None, ...], str | None]:
        question, names = request.question, request.continuations
        if question is None:
            raise Failed(NOT_TYPED)
        decisions = self.path == "decisions"
        form = _decisions_request if decisions else _systemone_request
        body = {"model": self.model, **form(question, names)}
        post: Any = client.post

        def call() -> Any:
            options = {"headers": self._headers()}
            return post(f"/{self.path}", cast_to=httpx2.Response, body=body, options=options)

        answer = self._accept(await self._post(call), _Decisions)
        if not self._answered:
            self._answered, self._version = True, answer.model
        read = _decisions_probabilities if decisions else _systemone_probabilities
        try:
            return log_probabilities(read(question, names, answer.answers)), None
        except ValueError as error:
            raise Failed(f"the decision model could not answer: {error}") from None


def _systemone_request(question: Question, names: tuple[str, ...]) -> dict[str, Any]:
    return {"state": question.state, "questions": {NAME: typed(question, names)}}


def _decisions_request(question: Question, names: tuple[str, ...]) -> dict[str, Any]:
    asked: dict[str, Any] = {"name": NAME, "instructions": question.instructions}
    if question.kind == "choice":
        choices = zip(names, question.criteria, strict=True)
        asked |= {"type": "choice", "choices": [{"value": n, "description": text} for n, text in choices]}
    elif question.kind == "score":
        asked |= {"type": "score", "levels": [{"label": text} for text in question.criteria]}
    else:  # the API takes no descriptions of yes and no, so they stand in the instructions
        descriptions = "".join(f"\n{n}: {c}" for n, c in zip(("Yes", "No"), question.criteria, strict=False))
        asked |= {"type": "predicate", "instructions": question.instructions + descriptions}
    state = question.state
    text = state if isinstance(state, str) else json.dumps(state, ensure_ascii=False)
    return {"input": text, "questions": [asked]}


def _systemone_probabilities(question: Question, names: tuple[str, ...], answers: Any) -> list[float]:
    if not isinstance(answers, dict) or answers.get(NAME) is None:
        raise ValueError("the question is not among the answers")
    return probabilities(question, names, answers[NAME])


def _decisions_probabilities(question: Question, names: tuple[str, ...], answers: Any) -> list[float]:
    if not isinstance(answers, list) or len(answers) != 1 or not isinstance(answers[0], dict):
        raise ValueError("there is not one answer to one question")
    answer = answers[0]
    if answer.get("type") == "refusal":
        raise ValueError("it refused")
    try:
        if question.kind == "noul":
            values = [float(answer["probability"]), 1 - float(answer["probability"])]
        else:
            keys = names if question.kind == "choice" else range(len(question.criteria))
            by_value = {p["value"]: float(p["probability"]) for p in answer["probabilities"]}
            values = [by_value[key] for key in keys]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is not one to a {question.kind} question ({type(error).__name__})") from None
    return check_distribution(values)


ENGINE = SystemOneEngine
