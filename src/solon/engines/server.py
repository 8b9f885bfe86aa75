"""A model behind an OpenAI-compatible endpoint: vLLM, Ollama, `transformers serve`, a vendor.

`server:MODEL@http://host:port/v1` names it.

What is left out, and why. The server renders the chat template and tokenises, so control tokens written in a
message are its to refuse (`LocalEngine` refuses them itself). A chat API gives at most the 20 most likely
tokens, so `score` takes single option letters only, and one that is not among them is an abstention, not a
zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI
from pydantic import BaseModel, Field, ValidationError

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest, Scores
from solon.engines.endpoint import Endpoint, Failed, key_for, parse_spec, price_usd, where
from solon.engines.local import DEFAULT_SYSTEM
from solon.records import Chat, Message, fingerprint, user

NOT_TOLD = -9000.0  # OpenAI writes -9999 for "very unlikely" in place of a log-probability


class _Token(BaseModel):
    token: str
    logprob: float | None = None


class _Position(_Token):
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _PromptTokens(BaseModel):
    cached_tokens: int | None = Field(default=None, ge=0)


class _Used(BaseModel):
    prompt_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int | None = Field(default=None, ge=0)
    prompt_tokens_details: _PromptTokens | None = None


class _Answer(BaseModel):
    """What Solon reads of a chat completion. Servers differ in the rest, and it is let be."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Used | None = None
    system_fingerprint: str | None = None

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

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        system: str | None = DEFAULT_SYSTEM,
        top_logprobs: int = 20,
        continue_final_message: bool = False,
        **options: Any,
    ) -> None:
        """options: as `Endpoint` takes them.

        top_logprobs: most a server may be asked for; OpenAI and vLLM allow 20, some vendors 5.
        continue_final_message: the server can continue an assistant's message (vLLM can), so `score` sends
        its prefix; otherwise the prefix is left out and the letter looked for in the answer's first token.
        """
        super().__init__(model, base_url, **options)
        self.system = system or None  # "" sends none, as null does in a recipe
        self.top_logprobs, self.continue_final_message = top_logprobs, continue_final_message
        self._system_fingerprint: str | None = None
        self._answered = False

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
                if choice.finish_reason == "content_filter":
                    raise Failed("the server's content filter withheld the answer")
                text = choice.message.content or choice.message.refusal or ""
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
        """Text of the first word → its log-probability, spellings summed."""
        position, *_ = await self._top(client, request, tokens=1)
        if position.token.strip() == "(":
            first, *rest = await self._top(client, request, tokens=2)
            position = first
            if first.token.strip() == "(":
                if not rest:
                    raise Failed('the server\'s answer ended after "("')
                position = rest[0]
        candidates = [(t.token, t.logprob) for t in position.top_logprobs or ()]
        if (position.token, position.logprob) not in candidates:  # some servers leave the sampled token out
            candidates.append((position.token, position.logprob))
        spellings: dict[str, list[float]] = {}
        for token, logprob in candidates:
            if logprob is not None and NOT_TOLD < logprob < math.inf:  # not nan either
                spellings.setdefault(token.strip().lstrip("(").strip(), []).append(logprob)
        return {word: _log_sum_exp(logprobs) for word, logprobs in spellings.items()}

    async def _top(self, client: AsyncOpenAI, request: ScoreRequest, *, tokens: int) -> list[_Position]:
        """The answer's first positions, each with its most likely tokens."""
        messages = self._messages(request.chat)
        extra: dict[str, Any] = {}
        if self.continue_final_message and request.prefix:
            messages.append({"role": "assistant", "content": request.prefix})
            extra["extra_body"] = {"add_generation_prompt": False, "continue_final_message": True}
        answer = await self._ask(
            client,
            messages,
            max_tokens=tokens,
            temperature=0.0,
            logprobs=True,
            top_logprobs=self.top_logprobs,
            **extra,
        )
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
        """One request, tried again where that may help. As `Endpoint._post`."""

        create: Any = client.chat.completions.with_raw_response.create

        def call() -> Any:
            return create(model=self.model, messages=messages, extra_headers=self._headers(), **options)

        try:
            answer = _Answer.model_validate_json(await self._post(call))
        except ValidationError as error:
            raise Failed(f"the server's answer is not a chat completion ({where(error)})") from None
        if not self._answered:
            self._answered, self._system_fingerprint = True, answer.system_fingerprint
        prompt_tokens, cached_tokens, completion_tokens = answer.tokens
        cost = None
        if answer.usage is not None:
            cost = price_usd(self.model, self.base_url, prompt_tokens, completion_tokens, cached_tokens)
        self._count(0, prompt_tokens, completion_tokens, cost)
        return answer


def _seed(request: GenerationRequest) -> int:
    """The request's own: two samples of one prompt differ by their ids alone. 31 bits: all take them."""
    return int(fingerprint("sample", request.id, request.seed), 16) % 2**31


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
