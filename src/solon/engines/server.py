"""A model behind an OpenAI-compatible endpoint: vLLM, Ollama, `transformers serve`, a vendor.

The name `server:MODEL@http://host:port/v1` opens the engine. Two things are left out. The server renders the chat template
and tokenises, so the server must refuse control tokens in a message (`LocalEngine` refuses them itself). A chat API gives at
most the 20 most likely tokens, so `score` takes single option letters only, and an option that is not among these tokens is
an abstention, not a probability of 0.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI
from pydantic import AliasChoices, BaseModel, Field

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest
from solon.engines.decision import ROUNDED
from solon.engines.endpoint import Answer, Endpoint
from solon.engines.failures import Failed
from solon.errors import printable
from solon.models.chat.reasoning import in_reasoning, without_reasoning
from solon.records import Chat, Message, fingerprint, user
from solon.settings import DEFAULT_SYSTEM
from solon.terminal import note

NO_LOGPROB = -9000.0  # OpenAI writes -9999 for "very unlikely" in place of a log-probability
REASONING = 2048  # a model that reasons before it names an option must name it within this number of tokens
AHEAD = 4  # the first word must stand within this number of tokens, after signs such as "**"
OPTIONAL = ("temperature", "top_p", "seed")  # parameters without which a server can still answer


class _Token(BaseModel):
    token: str
    logprob: float | None = None
    bytes: list[int] | None = None

    @property
    def text(self) -> str:
        return token_text(self.token, self.bytes)


class _Position(_Token):
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning: Any = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))
    tool_calls: Any = None

    @property
    def text(self) -> str | None:
        """The text of the message; of a content in parts, the parts that are text. None: the message has no text."""
        if isinstance(self.content, list):
            texts = [part["text"] for part in self.content if isinstance(part.get("text"), str)]
            return "".join(texts) if texts else None
        return self.refusal if self.content is None else self.content


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _ChatCompletion(Answer):
    choices: list[_Choice] = Field(min_length=1)
    system_fingerprint: str | None = None


class ServerEngine(Endpoint):
    kind = "server"
    serves = "chat completions"
    answers = "a chat completion"

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        system: str | None = DEFAULT_SYSTEM,
        top_logprobs: int = 20,
        continue_final_message: bool | None = None,
        **options: Any,
    ) -> None:
        """options: as `Endpoint` takes them.

        top_logprobs: the number of tokens that Solon asks for, per position. Where the server says that it gives fewer,
        Solon asks for fewer (OpenAI and vLLM give 20, some vendors 5). continue_final_message: the server can continue
        an assistant's message (vLLM can), so `score` sends its prefix. Otherwise `score` leaves the prefix out and looks
        for the letter in the answer's first token. None: whether SOLON_CONTINUE_FINAL_MESSAGE is 1.
        """
        super().__init__(model, base_url, **options)
        self.system = system or None  # an empty system message is not sent, as null in a recipe
        if continue_final_message is None:
            continue_final_message = os.environ.get("SOLON_CONTINUE_FINAL_MESSAGE") == "1"
        self.top_logprobs, self.continue_final_message = top_logprobs, continue_final_message
        self._limit_name = "max_tokens"  # newer models of some vendors call the parameter max_completion_tokens
        self._left_out: frozenset[str] = frozenset()  # parameters that the server refuses
        self._system_fingerprint: str | None = None

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> ServerEngine:
        return cls.load(spec, system=system)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's name, the server's host, Solon's system message and the server's `system_fingerprint`.

        The first answer brings the `system_fingerprint`. Before any answer, Solon asks for one token, so that the first
        record of a run has the fingerprint of the last record.
        """
        if not self._answered:
            probe = GenerationRequest("fingerprint", (user("Hi"),))
            list(self.generate([probe], Sampling(max_tokens=1, temperature=0.0)))
        host = urlsplit(self.base_url).netloc
        return fingerprint("server", self.model, host, self.system, self._system_fingerprint)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        """Complete each chat. A request that fails after all attempts is a Completion with `error`.

        Raises InputError as `score` does.
        """
        # OpenAI's own API has no such parameter; vLLM and others read it from the body.
        extra = {"repetition_penalty": sampling.repetition_penalty} if sampling.repetition_penalty != 1 else None

        async def complete(client: AsyncOpenAI, request: GenerationRequest) -> Completion:
            try:
                answer = await self._ask(
                    client,
                    self._messages(request.chat),
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=_seed(request),
                    extra_body=extra,
                )
                choice = answer.choices[0]
                text = _answer_text(choice)
            except Failed as error:
                return Completion(request.id, "", ended=False, error=str(error), again=error.again)
            prompt_tokens, _, completion_tokens = answer.tokens
            ended = choice.finish_reason == "stop"
            return Completion(request.id, text.strip(), ended, prompt_tokens, completion_tokens)

        return self._stream(list(requests), complete)

    async def _score(self, client: AsyncOpenAI, request: ScoreRequest) -> tuple[tuple[float | None, ...], str | None]:
        """Log-probability of each option letter as the first word of the answer; None where the server gives none.

        The spellings of a letter ("A", " A", "(A") are summed. Where the answer begins with a lone "(", the letter is
        read after it.
        """
        options = request.continuations
        for option in options:
            if not re.fullmatch("[A-Za-z0-9]", option):
                raise Failed(f'a server can score single option letters only, not "{option}"')
        letters = await self._first_words(client, request)
        missing = [option for option in options if option not in letters]
        reason = None
        if missing:
            subject = f"option {missing[0]} is" if not missing[1:] else f"options {' and '.join(missing)} are"
            reason = f"{subject} not among the server's {self.top_logprobs} most likely tokens"
        return tuple(letters.get(option) for option in options), reason

    async def _first_words(self, client: AsyncOpenAI, request: ScoreRequest) -> dict[str, float]:
        """Each possible first word of the answer → its log-probability, its spellings summed.

        The first word stands after the model's reasoning, if there is any, and after opening signs such as "(".
        """
        positions = await self._top(client, request, tokens=1)
        first = positions[0].text
        if in_reasoning(first) and first.strip():
            positions = _after_reasoning(await self._top(client, request, tokens=REASONING))
        elif not _word(first):
            positions = await self._top(client, request, tokens=2 if first.strip() == "(" else AHEAD)
        position = next((p for p in positions if _word(p.text)), None)
        if position is None:
            raise Failed(f'the server\'s answer ended after "{printable(positions[-1].text, 20)}"')
        candidates = [(token.text, token.logprob) for token in position.top_logprobs or ()]
        if (position.text, position.logprob) not in candidates:  # some servers leave the sampled token out
            candidates.append((position.text, position.logprob))
        # the comparison also drops nan
        known = [(text, p) for text, p in candidates if p is not None and NO_LOGPROB < p < math.inf]
        if any(p > 1e-3 for _, p in known) or _log_sum_exp([p for _, p in known] or [-1.0]) > math.log(1 + ROUNDED):
            raise Failed("the server's log-probabilities are none: their probabilities sum to more than 1")
        spellings: dict[str, list[float]] = {}
        for text, logprob in known:
            spellings.setdefault(_word(text), []).append(logprob)
        return {word: min(0.0, _log_sum_exp(logprobs)) for word, logprobs in spellings.items() if word}

    async def _top(self, client: AsyncOpenAI, request: ScoreRequest, *, tokens: int) -> list[_Position]:
        """The first positions of the answer, each with its most likely tokens."""
        messages = self._messages(request.chat)
        extra: dict[str, Any] = {}
        if self.continue_final_message and request.prefix:
            messages.append({"role": "assistant", "content": request.prefix})
            extra["extra_body"] = {"add_generation_prompt": False, "continue_final_message": True}
        answer = await self._ask(client, messages, max_tokens=tokens, temperature=0.0, logprobs=True, **extra)
        logprobs = answer.choices[0].logprobs
        if logprobs is None or not logprobs.content:
            raise Failed("the server returned no log-probabilities")
        return logprobs.content

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        """The chat in the form of the API. Solon's system message comes first, unless the chat brings one."""
        messages = list(chat)
        if self.system is not None and (not messages or messages[0].role != "system"):
            messages.insert(0, Message(role="system", content=self.system))
        return [{"role": m.role, "content": m.content} for m in messages]

    async def _ask(self, client: AsyncOpenAI, messages: list[dict[str, Any]], **options: Any) -> _ChatCompletion:
        """One request. Where the server refuses a parameter, the request is sent again without it. Raises as `_post`."""
        create: Any = client.chat.completions.with_raw_response.create
        while True:
            parameters = self._parameters(options)

            def call(parameters: dict[str, Any] = parameters) -> Any:
                return create(model=self.model, messages=messages, extra_headers=self._headers(), **parameters)

            try:
                body = await self._post(call)
                break
            except Failed as error:
                self._adapt(error, parameters)
                if self._parameters(options) == parameters:
                    raise
        answer = self._accept(body, _ChatCompletion)
        if not self._answered:
            self._answered, self._system_fingerprint = True, answer.system_fingerprint
        return answer

    def _parameters(self, options: dict[str, Any]) -> dict[str, Any]:
        """The parameters in the form that this server takes, as far as its refusals have shown it."""
        parameters = {name: value for name, value in options.items() if name not in self._left_out}
        parameters[self._limit_name] = parameters.pop("max_tokens")
        if "logprobs" in parameters:
            parameters["top_logprobs"] = self.top_logprobs
        return parameters

    def _adapt(self, refusal: Failed, parameters: dict[str, Any]) -> None:
        """Learn from a refused request which parameters the server takes; at most once for each parameter."""
        if refusal.status not in (200, 400, 422) or refusal.again:
            return
        words = refusal.words
        named = [refusal.parameter] if refusal.parameter in parameters else [n for n in parameters if n in words]
        if "max_completion_tokens" in words and "max_tokens" in parameters:
            self._limit_name = "max_completion_tokens"
        elif "top_logprobs" in named and "top_logprobs" in parameters:
            asked = parameters["top_logprobs"]
            numbers = [int(n) for n in re.findall(r"\d+", words) if 0 < int(n) < asked]
            lower = max(numbers, default=5 if asked > 5 else 0)
            if lower:
                self.top_logprobs = min(self.top_logprobs, lower)
        elif refused := [n for n in named if n in OPTIONAL and n not in self._left_out]:
            self._left_out |= set(refused)
            if "logprobs" not in parameters or refused != ["temperature"]:  # temperature does not change logprobs
                note(f"{self.name}: the server refuses {' and '.join(refused)}; it samples without ({words})")


def _answer_text(choice: _Choice) -> str:
    """The answer without the reasoning. Raises Failed where there is no answer."""
    message, text = choice.message, choice.message.text
    if choice.finish_reason == "content_filter":
        raise Failed("the server's content filter withheld the answer")
    if choice.finish_reason == "error":
        raise Failed("the server broke the answer off with an error", again=True)
    if text is None and message.tool_calls:
        raise Failed("the model called a tool in place of an answer")
    cut = Failed("the answer was cut inside the model's reasoning; allow more tokens (max_tokens)")
    if not text and message.reasoning and choice.finish_reason == "length":
        raise cut
    if text is None:
        raise Failed("the server's answer holds no text")
    answer = without_reasoning(text)
    if not answer.strip() and text.strip():
        raise cut
    return answer


def _after_reasoning(positions: list[_Position]) -> list[_Position]:
    """The positions after the model's reasoning. Raises Failed where the reasoning does not end."""
    text = ""
    for n, position in enumerate(positions):
        if text and not in_reasoning(text + position.text):
            return positions[n:]
        text += position.text
    raise Failed(f"the model's reasoning did not end within {len(positions)} tokens, so no option is named")


def token_text(token: str, token_bytes: list[int] | None = None) -> str:
    """A token as text. token_bytes: the bytes of the token, where the server gives them.

    Some servers send tokens as the tokenizer's vocabulary spells them: `▁A` (SentencePiece) or `ĠA` (byte-level BPE) for
    " A", and `<0x41>` for a byte.
    """
    if token_bytes and all(0 <= b < 256 for b in token_bytes):
        return bytes(token_bytes).decode("utf-8", "replace")
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)]).decode("utf-8", "replace")
    return token.translate({0x2581: " ", 0x120: " ", 0x10A: "\n", 0x109: "\t"})


def _word(text: str) -> str:
    """The word in a token, without the signs that may stand before it: "A" in " (A"; "" where a token has signs only."""
    return text.strip().lstrip("(*[\"'`<").strip() if any(c.isalnum() for c in text) else ""


def _seed(request: GenerationRequest) -> int:
    """The seed of one request. Two samples of one prompt differ by their ids alone. All servers take 31 bits."""
    return int(fingerprint("sample", request.id, request.seed), 16) % 2**31


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


ENGINE = ServerEngine
