"""A model behind an OpenAI-compatible endpoint: vLLM, Ollama, `transformers serve`, a vendor.

`server:MODEL@http://host:port/v1` names it.

What is left out, and why. The server renders the chat template and tokenises, so control tokens written in a
message are its to refuse (`LocalEngine` refuses them itself). A chat API gives at most the 20 most likely
tokens, so `score` takes single option letters only, and one that is not among them is an abstention, not a
zero.
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
from pydantic import AliasChoices, BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest, Scores
from solon.engines.decision import ROUNDED
from solon.engines.endpoint import Endpoint, Failed, key_for, parse_spec, price_usd, where
from solon.errors import printable
from solon.models.chat.reasoning import in_reasoning, without_reasoning
from solon.records import Chat, Message, fingerprint, user
from solon.settings import DEFAULT_SYSTEM
from solon.terminal import note

NOT_TOLD = -9000.0  # OpenAI writes -9999 for "very unlikely" in place of a log-probability
MOST_TOKENS = 10**9  # of one request; more is a slip of the server
REASONING = 2048  # tokens in which a model that reasons before it names an option must name it
AHEAD = 4  # tokens in which the first word must stand, after signs such as "**"
OPTIONAL = ("temperature", "top_p", "seed")  # what an answer can be had without


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
        """What the message says; of a content in parts, the parts that are text. None: nothing."""
        if isinstance(self.content, list):
            texts = [part["text"] for part in self.content if isinstance(part.get("text"), str)]
            return "".join(texts) if texts else None
        return self.refusal if self.content is None else self.content


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _PromptTokens(BaseModel):
    cached_tokens: int | None = Field(default=None, ge=0)


class _Used(BaseModel):
    prompt_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    completion_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    prompt_tokens_details: _PromptTokens | None = None


class _Answer(BaseModel):
    """What Solon reads of a chat completion. Servers differ in the rest, and it is let be."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Used | None = None
    system_fingerprint: str | None = None

    @field_validator("usage", mode="wrap")
    @classmethod
    def _or_not_told(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """A count that cannot be one is a count that was not told; the answer beside it stays one."""
        try:
            return read(value)
        except ValidationError:
            return None

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Prompt tokens, those of them read from a cache, completion tokens; 0 where not told."""
        used = self.usage or _Used()
        cached = used.prompt_tokens_details.cached_tokens if used.prompt_tokens_details else None
        prompt = used.prompt_tokens or 0
        return prompt, min(cached or 0, prompt), used.completion_tokens or 0


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

        top_logprobs: most the server is asked for; lowered where it says that it gives fewer (OpenAI and vLLM give 20,
        some vendors 5). continue_final_message: the server can continue an assistant's message (vLLM can), so `score`
        sends its prefix; otherwise the prefix is left out and the letter looked for in the answer's first token. None:
        whether SOLON_CONTINUE_FINAL_MESSAGE is 1.
        """
        super().__init__(model, base_url, **options)
        self.system = system or None  # "" sends none, as null does in a recipe
        if continue_final_message is None:
            continue_final_message = os.environ.get("SOLON_CONTINUE_FINAL_MESSAGE") == "1"
        self.top_logprobs, self.continue_final_message = top_logprobs, continue_final_message
        self._limit_name = "max_tokens"  # newer models of some vendors call it max_completion_tokens
        self._left_out: frozenset[str] = frozenset()  # parameters that the server refuses
        self._system_fingerprint: str | None = None
        self._answered = False

    @classmethod
    def open(cls, spec: str, *, system: str | None, dtype: str) -> ServerEngine:
        return cls.load(spec, system=system)

    @classmethod
    def load(cls, spec: str, *, system: str | None = DEFAULT_SYSTEM, **options: Any) -> ServerEngine:
        """spec: `server:MODEL@URL`. The key comes from the environment (`key_for`). Connects to nothing yet.

        Raises InputError for a malformed spec.
        """
        model, base_url = parse_spec(spec)
        return cls(model, base_url, system=system, key=key_for(base_url), **options)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model's name, the server's host, Solon's system message and what the server says of itself.

        The last (`system_fingerprint`) is known from the first answer on. Where there was none yet, one token
        is asked for, so that the first record of a run has the fingerprint of the last.
        """
        if not self._answered:
            probe = GenerationRequest("fingerprint", (user("Hi"),))
            for _ in self.generate([probe], Sampling(max_tokens=1, temperature=0.0)):
                pass
        host = urlsplit(self.base_url).netloc
        return fingerprint("server", self.model, host, self.system, self._system_fingerprint)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        """Complete each chat. A request that finally fails is a Completion with `error`.

        Raises InputError where no request could succeed: a refused key, an unknown model, a redirect, and a
        server that was never reached.
        """

        # Not in OpenAI's own API; vLLM and others read it from the body. Sent only where it says something.
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
                prompt_tokens, _, completion_tokens = answer.tokens
            except Failed as error:
                return Completion(request.id, "", ended=False, error=str(error), again=error.again)
            ended = choice.finish_reason == "stop"
            return Completion(request.id, text.strip(), ended, prompt_tokens, completion_tokens)

        return self._stream(list(requests), complete)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each option letter as the answer's first word; None where not told.

        The spellings of a letter ("A", " A", "(A") are summed. Where the answer opens with a lone "(", the
        letter is read after it. Raises InputError as `generate` does.
        """

        async def read(client: AsyncOpenAI, request: ScoreRequest) -> Scores:
            options = request.continuations
            try:
                for option in options:
                    if not re.fullmatch("[A-Za-z0-9]", option):
                        raise Failed(f'a server can score single option letters only, not "{option}"')
                found = await self._letters(client, request)
            except Failed as error:
                return Scores(request.id, (None,) * len(options), str(error), error.again)
            missing = [o for o in options if o not in found]
            reason = None
            if missing:
                which = f"option {missing[0]} is" if not missing[1:] else f"options {' and '.join(missing)} are"
                reason = f"{which} not among the server's {self.top_logprobs} most likely tokens"
            return Scores(request.id, tuple(found.get(o) for o in options), reason)

        return self._stream(list(requests), read)

    async def _letters(self, client: AsyncOpenAI, request: ScoreRequest) -> dict[str, float]:
        """Text of the first word → its log-probability, spellings summed.

        The first word stands after the model's reasoning, where it reasons, and after opening signs such as "(".
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
        candidates = [(t.text, t.logprob) for t in position.top_logprobs or ()]
        if (position.text, position.logprob) not in candidates:  # some servers leave the sampled token out
            candidates.append((position.text, position.logprob))
        known = [(text, p) for text, p in candidates if p is not None and NOT_TOLD < p < math.inf]  # not nan either
        if any(p > 1e-3 for _, p in known) or _log_sum_exp([p for _, p in known] or [-1.0]) > math.log(1 + ROUNDED):
            raise Failed("the server's log-probabilities are none: their probabilities sum to more than 1")
        spellings: dict[str, list[float]] = {}
        for text, logprob in known:
            spellings.setdefault(_word(text), []).append(logprob)
        return {word: min(0.0, _log_sum_exp(logprobs)) for word, logprobs in spellings.items() if word}

    async def _top(self, client: AsyncOpenAI, request: ScoreRequest, *, tokens: int) -> list[_Position]:
        """The answer's first positions, each with its most likely tokens."""
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
        """As the API takes them, Solon's system message first unless the chat brings its own."""
        messages = list(chat)
        if self.system is not None and (not messages or messages[0].role != "system"):
            messages.insert(0, Message(role="system", content=self.system))
        return [{"role": m.role, "content": m.content} for m in messages]

    async def _ask(self, client: AsyncOpenAI, messages: list[dict[str, Any]], **options: Any) -> _Answer:
        """One request, tried again where that may help, and with other parameters where the server refuses some.

        As `Endpoint._post`.
        """
        create: Any = client.chat.completions.with_raw_response.create
        while True:
            given = self._parameters(options)

            def call(given: dict[str, Any] = given) -> Any:
                return create(model=self.model, messages=messages, extra_headers=self._headers(), **given)

            try:
                answer = _Answer.model_validate(await self._post(call))
                break
            except ValidationError as error:
                raise Failed(f"the server's answer is not a chat completion ({where(error)})") from None
            except Failed as error:
                self._adapt(error, given)
                if self._parameters(options) == given:
                    raise
        if not self._answered:
            self._answered, self._system_fingerprint = True, answer.system_fingerprint
        prompt_tokens, cached_tokens, completion_tokens = answer.tokens
        cost = None
        if answer.usage is not None:
            cost = price_usd(self.model, self.base_url, prompt_tokens, completion_tokens, cached_tokens)
        self._count(0, prompt_tokens, completion_tokens, cost)
        return answer

    def _parameters(self, options: dict[str, Any]) -> dict[str, Any]:
        """The parameters as this server takes them, by what it has refused so far."""
        given = {name: value for name, value in options.items() if name not in self._left_out}
        given[self._limit_name] = given.pop("max_tokens")
        if "logprobs" in given:
            given["top_logprobs"] = self.top_logprobs
        return given

    def _adapt(self, refusal: Failed, given: dict[str, Any]) -> None:
        """Learn from a refused request which parameters the server takes; at most once for each of them."""
        if refusal.status not in (200, 400, 422) or refusal.again:
            return
        words = refusal.words
        named = [refusal.parameter] if refusal.parameter in given else [n for n in given if n in words]
        if "max_completion_tokens" in words and "max_tokens" in given:
            self._limit_name = "max_completion_tokens"
        elif "top_logprobs" in named and "top_logprobs" in given:
            numbers = [int(n) for n in re.findall(r"\d+", words) if 0 < int(n) < given["top_logprobs"]]
            lower = max(numbers, default=5 if given["top_logprobs"] > 5 else 0)
            if lower:
                self.top_logprobs = min(self.top_logprobs, lower)
        elif refused := [n for n in named if n in OPTIONAL and n not in self._left_out]:
            self._left_out |= set(refused)
            if "logprobs" not in given or refused != ["temperature"]:  # log-probabilities do not depend on it
                note(f"{self.name}: the server refuses {' and '.join(refused)}; it samples without ({words})")


def _answer_text(choice: _Choice) -> str:
    """The answer itself, without reasoning. Raises Failed where there is none."""
    message, text = choice.message, choice.message.text
    if choice.finish_reason == "content_filter":
        raise Failed("the server's content filter withheld the answer")
    if choice.finish_reason == "error":
        raise Failed("the server broke the answer off with an error", again=True)
    if text is None and message.tool_calls:
        raise Failed("the model called a tool in place of an answer")
    if not text and message.reasoning and choice.finish_reason == "length":
        raise Failed("the answer was cut inside the model's reasoning; allow more tokens (max_tokens)")
    if text is None:
        raise Failed("the server's answer holds no text")
    answer = without_reasoning(text)
    if not answer.strip() and text.strip():
        raise Failed("the answer was cut inside the model's reasoning; allow more tokens (max_tokens)")
    return answer


def _after_reasoning(positions: list[_Position]) -> list[_Position]:
    """The positions after the model's reasoning. Raises Failed where it does not end."""
    text = ""
    for n, position in enumerate(positions):
        if text and not in_reasoning(text + position.text):
            return positions[n:]
        text += position.text
    raise Failed(f"the model's reasoning did not end within {len(positions)} tokens, so no option is named")


def token_text(token: str, own: list[int] | None = None) -> str:
    """A token as text. own: its bytes, where the server tells them.

    Some servers send tokens as the tokenizer's vocabulary spells them: `▁A` (SentencePiece) or `ĠA` (byte-level BPE) for
    " A", `<0x41>` for a byte.
    """
    if own and all(0 <= b < 256 for b in own):
        return bytes(own).decode("utf-8", "replace")
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)]).decode("utf-8", "replace")
    return token.translate({0x2581: " ", 0x120: " ", 0x10A: "\n", 0x109: "\t"})


def _word(text: str) -> str:
    """The word in a token, without the signs that may stand before it: "A" of " (A"; "" where there are signs alone."""
    return text.strip().lstrip("(*[\"'`<").strip() if any(c.isalnum() for c in text) else ""


def _seed(request: GenerationRequest) -> int:
    """The request's own: two samples of one prompt differ by their ids alone. 31 bits: all take them."""
    return int(fingerprint("sample", request.id, request.seed), 16) % 2**31


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


ENGINE = ServerEngine
