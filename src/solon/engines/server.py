"""A model behind an OpenAI-compatible endpoint: vLLM, Ollama, `transformers serve`, a vendor.

`server:MODEL@http://host:port/v1` names it. Requests run beside each other on an event loop in a thread of
its own; whoever reads the completions gets each as it finishes and may stop at any time.

What is left out, and why. The server renders the chat template and tokenises, so control tokens written in a
message are its to refuse (`LocalEngine` refuses them itself). A chat API gives at most the 20 most likely
tokens, so `score` takes single option letters only, and one that is not among them is an abstention, not a
zero. There is one retry layer, here, and the client's own is off: otherwise attempts multiply and the ledger
is wrong.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import genai_prices
import httpx2
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, Omit, OpenAIError
from pydantic import BaseModel, Field, SecretStr, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from solon.engines.base import Completion, GenerationRequest, Sampling, ScoreRequest, Scores, Usage
from solon.engines.local import DEFAULT_SYSTEM
from solon.errors import InputError
from solon.records import Chat, Message, fingerprint, user

FORM = "server:MODEL@http://host:port/v1"
LONGEST_WAIT = 300.0  # seconds; a server that asks for more (a spent quota, say) is not waited for
NOT_TOLD = -9000.0  # OpenAI writes -9999 for "very unlikely" in place of a log-probability

T = TypeVar("T")
R = TypeVar("R")


class _Failed(Exception):
    """This one request could not be answered; the message goes into its outcome."""


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
    prompt_tokens: int = Field(default=0, ge=0)
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
        return used.prompt_tokens, min(cached or 0, used.prompt_tokens), used.completion_tokens or 0


class ServerEngine:
    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        system: str | None = DEFAULT_SYSTEM,
        key: SecretStr | None = None,
        max_connections: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 0.5,
        top_logprobs: int = 20,
        continue_final_message: bool = False,
    ) -> None:
        """timeout: seconds an answer may keep silent. attempts: of one request, the first included.

        backoff: seconds before the second attempt; doubled for each later one, up to 30, with jitter.
        top_logprobs: most a server may be asked for; OpenAI and vLLM allow 20, some vendors 5.
        continue_final_message: the server can continue an assistant's message (vLLM can), so `score` sends
        its prefix; otherwise the prefix is left out and the letter looked for in the answer's first token.
        """
        if max_connections < 1 or attempts < 1 or timeout <= 0:
            raise InputError("max_connections, attempts and timeout of a server must be above 0")
        self.model, self.base_url, self.system = model, base_url, system
        self.name = f"server:{model}@{base_url}"
        self.max_connections, self.timeout = max_connections, timeout
        self.attempts, self.backoff = attempts, backoff
        self.top_logprobs, self.continue_final_message = top_logprobs, continue_final_message
        self.usage = Usage()  # requests: every attempt made, those that failed included
        self._key = key
        self._lock = threading.Lock()  # over usage: two generators may be read at once
        self._jitter = random.Random()  # its own, so that the seeded global one is left alone
        self._reached = False  # the server has answered something, be it an error
        self._system_fingerprint: str | None = None
        self._answered = False

    @classmethod
    def load(cls, spec: str, *, system: str | None = DEFAULT_SYSTEM, **options: Any) -> ServerEngine:
        """spec: `server:MODEL@URL`. The key comes from the environment (`key_for`). Connects to nothing yet.

        Raises InputError for a malformed spec.
        """
        model, base_url = parse_spec(spec)
        return cls(model, base_url, system=system, key=key_for(base_url), **options)

    def __repr__(self) -> str:
        return f"ServerEngine({self.name!r})"

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
                    raise _Failed("the server's content filter withheld the answer")
                text = choice.message.content or choice.message.refusal or ""
                prompt_tokens, _, completion_tokens = answer.tokens
            except _Failed as error:
                return Completion(request.id, "", ended=False, error=str(error))
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
                        raise _Failed(f'a server can score single option letters only, not "{option}"')
                found = await self._letters(client, request)
            except _Failed as error:
                return Scores(request.id, (None,) * len(options), str(error))
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
                    raise _Failed('the server\'s answer ended after "("')
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
            raise _Failed("the server returned no log-probabilities")
        return logprobs.content

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        """As the API takes them, Solon's system message first unless the chat brings its own."""
        messages = list(chat)
        if self.system is not None and (not messages or messages[0].role != "system"):
            messages.insert(0, Message(role="system", content=self.system))
        return [{"role": m.role, "content": m.content} for m in messages]

    def _headers(self) -> dict[str, Any]:
        """This engine's key or none; OpenAI's client would send the environment's to any host."""
        key = Omit() if self._key is None else f"Bearer {self._key.get_secret_value()}"
        account = {} if _is_openai(self.base_url) else {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return {"Authorization": key, **account}

    def _client(self) -> AsyncOpenAI:
        """A client that neither tries again nor follows redirects."""
        return AsyncOpenAI(
            api_key="unused",  # `_headers` has it
            base_url=self.base_url,
            max_retries=0,
            default_headers=self._headers(),  # against OPENAI_CUSTOM_HEADERS
            http_client=httpx2.AsyncClient(
                follow_redirects=False,
                timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout)),
                limits=httpx2.Limits(max_connections=self.max_connections),
                trust_env=not _is_loopback(self.base_url),  # no proxy stands before this machine itself
            ),
        )

    async def _ask(self, client: AsyncOpenAI, messages: list[dict[str, Any]], **options: Any) -> _Answer:
        """One request, tried again where that may help. Raises _Failed for it alone, InputError for all."""

        async def attempt() -> bytes:
            self._count(requests=1)
            create: Any = client.chat.completions.with_raw_response.create
            try:
                response = await create(model=self.model, messages=messages, extra_headers=self._headers(), **options)
            except APIStatusError:
                self._reached = True
                raise
            self._reached = True
            return response.content

        retrying = AsyncRetrying(stop=self._stop, wait=self._wait, retry=retry_if_exception(_passing), reraise=True)
        try:
            content: bytes = await retrying(attempt)
            answer = _Answer.model_validate_json(content)
        except (OpenAIError, httpx2.HTTPError) as error:
            raise self._outcome(error) from None  # the cause holds the request, and with it the key
        except ValidationError as error:
            raise _Failed(f"the server's answer is not a chat completion ({_where(error)})") from None
        if not self._answered:
            self._answered, self._system_fingerprint = True, answer.system_fingerprint
        prompt_tokens, cached_tokens, completion_tokens = answer.tokens
        cost = None
        if answer.usage is not None:
            cost = price_usd(self.model, self.base_url, prompt_tokens, completion_tokens, cached_tokens)
        self._count(0, prompt_tokens, completion_tokens, cost)
        return answer

    def _count(self, requests: int, prompt: int = 0, completion: int = 0, cost: float | None = 0.0) -> None:
        with self._lock:
            self.usage.add(requests, prompt, completion, cost)

    def _stop(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if not self._reached and _unreachable(error) and state.attempt_number >= 2:
            return True  # most likely a wrong address: say so soon
        return state.attempt_number >= self.attempts or (_retry_after(error) or 0.0) > LONGEST_WAIT

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: what the server asks for, or exponential; both with jitter."""
        asked = _retry_after(state.outcome.exception() if state.outcome else None)
        if asked is not None:
            return asked + self._jitter.uniform(0, self.backoff)
        return min(30.0, self.backoff * 2 ** (state.attempt_number - 1)) * self._jitter.uniform(0.5, 1.5)

    def _outcome(self, error: OpenAIError | httpx2.HTTPError) -> Exception:
        """What to raise for an error that attempts did not cure."""
        if isinstance(error, APITimeoutError) and not _unreachable(error):
            return _Failed(f"the server did not answer within {self.timeout:g} s")
        if isinstance(error, APIConnectionError):
            cause = self._clean(str(error.__cause__ or "")) or type(error.__cause__ or error).__name__
            if not self._reached:
                return InputError(f"{self.name}: no server answers there ({cause}); start it, or correct the address")
            return _Failed(f"the connection to the server failed ({cause})")
        if not isinstance(error, APIStatusError):
            return _Failed(f"the server's answer could not be read ({type(error).__name__})")
        status = error.status_code
        if status in (401, 403):
            return InputError(f"{self.name}: {self._refused()} ({status}); {self._key_advice()}")
        if status == 404:
            return InputError(
                f'{self.name}: the server has no model "{self.model}", or no chat completions there (404); '
                f"see what it has: curl {self.base_url}/models"
            )
        if 300 <= status < 400:
            to = self._clean(error.response.headers.get("location", "nowhere"))
            return InputError(
                f"{self.name}: the server redirects to {to} ({status}), which is not followed; give the final address"
            )
        detail = self._clean(_detail(error.body))
        waited = _retry_after(error)
        if waited and waited > LONGEST_WAIT:
            detail = f"asks to wait {waited:.0f} s" + (f": {detail}" if detail else "")
        return _Failed(f"the server answered {status}" + (f": {detail}" if detail else ""))

    def _refused(self) -> str:
        return "the server refused the key" if self._key else "the server wants a key"

    def _key_advice(self) -> str:
        host = urlsplit(self.base_url).hostname
        if self._key is None and os.environ.get("OPENAI_API_KEY"):
            return f"OPENAI_API_KEY goes to OpenAI only; set SOLON_API_KEY to the key for {host}"
        return f"set SOLON_API_KEY to a key that {host} accepts"

    def _clean(self, text: str) -> str:
        """A server's words on one printable line, without the key that some servers repeat."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "[key]")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= 200 else text[:199] + "…"

    def _stream(self, items: Sequence[T], ask: Callable[[AsyncOpenAI, T], Awaitable[R]]) -> Iterator[R]:
        """`ask` of each item, as they finish, at most `max_connections` at a time.

        Leaving the iterator, by Ctrl-C or otherwise, cancels what is under way.
        """
        results: queue.SimpleQueue[tuple[R] | None] = queue.SimpleQueue()

        async def work() -> None:
            waiting = iter(items)  # the workers share it: each takes the next item when it is free

            async def worker() -> None:
                for item in waiting:
                    results.put((await ask(client, item),))

            try:
                async with self._client() as client, asyncio.TaskGroup() as group:
                    for _ in range(min(self.max_connections, len(items))):
                        group.create_task(worker())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

        loop = asyncio.new_event_loop()
        task = loop.create_task(work())
        task.add_done_callback(lambda _: results.put(None))

        def run() -> None:
            with suppress(BaseException):  # read from the task below
                loop.run_until_complete(task)

        thread = threading.Thread(target=run, name="solon-server", daemon=True)
        thread.start()
        try:
            while (result := results.get()) is not None:
                yield result[0]
            task.result()
        finally:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
            thread.join(timeout=2.0)
            if not thread.is_alive():
                loop.close()


def parse_spec(spec: str) -> tuple[str, str]:
    """The model's name and the base URL out of `server:MODEL@URL`. Raises InputError, without passwords."""
    found = re.fullmatch(r"server:(?P<model>\S+?)@(?P<url>https?://\S+)", spec)
    if not found:
        shown = re.sub(r"//\S*@", "//…@", spec)
        raise InputError(f"{shown}: not the name of a server's model; give {FORM}")
    model, url = found["model"], found["url"].rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if "@" in url:
        raise InputError(f"server:{model}: the address holds a password; set SOLON_API_KEY and give {FORM}")
    if not host or parts.query or parts.fragment:
        raise InputError(f"{spec}: the address is not one of a server (host, port, path); give {FORM}")
    return model, url


def key_for(base_url: str) -> SecretStr | None:
    """SOLON_API_KEY; or OPENAI_API_KEY where the host is OpenAI's or that of OPENAI_BASE_URL.

    So a key kept for one host is not sent to another. Raises InputError for what cannot be a key.
    """
    name, key = "SOLON_API_KEY", os.environ.get("SOLON_API_KEY", "").strip()
    if not key and _is_openai(base_url):
        name, key = "OPENAI_API_KEY", os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):  # no header carries it, and the HTTP library's error would show it
        raise InputError(f"{name}: has characters that no key has (a space, a line break); set it anew")
    return SecretStr(key) if key else None


def price_usd(
    model: str, base_url: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0
) -> float | None:
    """US dollars by genai-prices: of the vendor at this address, or else the model's maker. None: not known.

    cached_tokens: those of prompt_tokens that the server read from its cache.
    """
    used = genai_prices.Usage(
        input_tokens=prompt_tokens, cache_read_tokens=cached_tokens, output_tokens=completion_tokens
    )
    with suppress(LookupError, ValueError):
        return float(genai_prices.calc_price(used, model, provider_api_url=base_url).total_price)
    with suppress(LookupError, ValueError):
        return float(genai_prices.calc_price(used, model).total_price)
    return None


def _seed(request: GenerationRequest) -> int:
    """The request's own: two samples of one prompt differ by their ids alone. 31 bits: all take them."""
    return int(fingerprint("sample", request.id, request.seed), 16) % 2**31


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def _passing(error: BaseException) -> bool:
    """Another attempt may succeed."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError)  # timeouts are among them


def _unreachable(error: BaseException | None) -> bool:
    """No connection was made at all."""
    return isinstance(error, APIConnectionError) and isinstance(
        error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout)
    )


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds the server asks to wait: a number or an HTTP date (RFC 9110, section 10.2.3)."""
    text = error.response.headers.get("retry-after") if isinstance(error, APIStatusError) else None
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _detail(body: Any) -> str:
    """The server's own words, out of the shapes that servers use."""
    while isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail")
    return body if isinstance(body, str) else "" if body is None else str(body)


def _where(error: ValidationError) -> str:
    """The first thing wrong, without the server's own words: `choices: Field required`."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(p) for p in first["loc"])
    return f"{place}: {first['msg']}" if place else "not JSON"


def _is_openai(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    own = urlsplit(os.environ.get("OPENAI_BASE_URL", "")).netloc
    if own and own == urlsplit(base_url).netloc:
        return True
    return base_url.startswith("https://") and (host == "openai.com" or host.endswith(".openai.com"))


def _is_loopback(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
