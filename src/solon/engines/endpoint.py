"""The base of the engines behind an endpoint: address, key, retries, the count of requests, and parallel requests.

Retries happen in one layer, here. The retries of OpenAI's client are off: two layers would multiply the attempts, and the
count of requests would be wrong. The address comes from a recipe or the command line only. Redirects are not followed, and
a key is sent to its host alone (`keys.py`). An answer has one deadline for the whole of it, and a limit on its size.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

import genai_prices
import httpx2
from openai import APIStatusError, APITimeoutError, AsyncOpenAI, Omit, OpenAIError
from pydantic import AliasChoices, BaseModel, Field, SecretStr, ValidationError, field_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from solon.engines import failures, transport
from solon.engines.base import ScoreRequest, Scores, Usage
from solon.engines.failures import ErrorInAnswer, Failed
from solon.engines.keys import is_loopback, is_openai, key_for
from solon.engines.transport import AnswerTooLarge, LimitedClient
from solon.errors import InputError, Outage, printable

OUTAGE = 8  # requests in a row without an answer, each after all its attempts, after which the endpoint counts as gone
TIMEOUTS = 2  # attempts of a request whose answer does not come in time
MOST_TOKENS = 10**9  # tokens of one request; a larger count is a mistake of the server
MAX_CONNECTIONS: ContextVar[int | None] = ContextVar("max_connections", default=None)  # of --max-connections
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A", bound="Answer")


class _CachedTokens(BaseModel):
    cached_tokens: int | None = Field(default=None, ge=0)


def _count_of(*names: str) -> Any:
    return Field(default=None, ge=0, le=MOST_TOKENS, validation_alias=AliasChoices(*names))


class _TokenUsage(BaseModel):
    """Token counts under the names of chat completions (prompt, completion) or of decisions (input, output)."""

    prompt: int | None = _count_of("prompt_tokens", "input_tokens")
    completion: int | None = _count_of("completion_tokens", "output_tokens")
    details: _CachedTokens | None = Field(
        default=None, validation_alias=AliasChoices("prompt_tokens_details", "input_tokens_details")
    )


class Answer(BaseModel):
    """The fields of an answer that Solon reads. Servers differ in the others, which Solon ignores."""

    usage: _TokenUsage | None = None

    @field_validator("usage", mode="wrap")
    @classmethod
    def _valid_usage(cls, value: Any, read: Callable[[Any], Any]) -> Any:
        """An impossible token count counts as missing. The rest of the answer remains valid."""
        with suppress(ValidationError):
            return read(value)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Prompt tokens, those of them that the server read from a cache, completion tokens; 0 where unknown."""
        usage = self.usage or _TokenUsage()
        prompt, cached = usage.prompt or 0, (usage.details and usage.details.cached_tokens) or 0
        return prompt, min(cached, prompt), usage.completion or 0


class Endpoint(ABC):
    """An engine named `KIND:MODEL@URL`. A subclass defines `generate`, `_score` and the form of the requests."""

    kind: ClassVar[str]  # the scheme of the engine's name
    serves: str  # the service that the server must have, for error messages
    answers: ClassVar[str]  # the form that an answer must have, for error messages

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key: SecretStr | None = None,
        max_connections: int | None = None,
        timeout: float | None = None,
        attempts: int = 6,
        backoff: float = 0.5,
    ) -> None:
        """max_connections: requests at the same time; None: SOLON_MAX_CONNECTIONS or 8. timeout: seconds from a
        request to the end of its answer; None: SOLON_TIMEOUT or 120. attempts: per request, the first one included.

        backoff: seconds before the second attempt. The wait doubles for each later attempt, up to 30 s, with jitter.
        Raises InputError for a number that is not above 0.
        """
        if max_connections is None:
            max_connections = MAX_CONNECTIONS.get()
        if max_connections is None:
            max_connections = int(transport.number_from_environment("SOLON_MAX_CONNECTIONS", 8, whole=True))
        timeout = transport.number_from_environment("SOLON_TIMEOUT", 120.0) if timeout is None else timeout
        if max_connections < 1 or attempts < 1 or timeout <= 0:
            raise InputError("max_connections, attempts and timeout of a server must be above 0")
        self.model, self.base_url, self.key = model, base_url, key
        self.name = f"{self.kind}:{model}@{base_url}"
        self.max_connections, self.timeout = max_connections, timeout
        self.attempts, self.backoff = attempts, backoff
        self.usage = Usage()  # requests: every attempt, also a failed one
        self.reached = False  # the server has answered a request, with an error or without
        self._answered = False  # the server has answered a request without an error
        self._lock = threading.Lock()  # for usage: two generators may be read at once
        self._jitter = random.Random()  # a separate generator, so that the seeded global one stays as it is
        self._unanswered = 0  # requests in a row without an answer
        self._last_failure = ""

    @classmethod
    def load(cls, spec: str, **options: Any) -> Self:
        """spec: `KIND:MODEL@URL`. options: as `__init__` takes them. The key comes from the environment (`key_for`).

        Loading connects to nothing. Raises InputError for a malformed spec.
        """
        model, base_url = parse_spec(spec, cls.kind)
        return cls(model, base_url, key=key_for(base_url), **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.name}: an endpoint is not pickled, since it may hold a key; load it where it is used")

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Log-probability of each continuation. A request that fails after all attempts is a Scores with `error`.

        Raises InputError where no request can succeed: a refused key, an unknown model, a redirect, or a server that
        was never reached.
        """

        async def ask(client: AsyncOpenAI, request: ScoreRequest) -> Scores:
            try:
                logprobs, reason = await self._score(client, request)
            except Failed as error:
                return Scores(request.id, (None,) * len(request.continuations), str(error), error.again)
            return Scores(request.id, logprobs, reason)

        return self._stream(list(requests), ask)

    @abstractmethod
    async def _score(self, client: AsyncOpenAI, request: ScoreRequest) -> tuple[tuple[float | None, ...], str | None]:
        """The score of one request. Raises as `_post`."""

    def clean(self, text: str) -> str:
        """A server's text on one printable line, without the key, which some servers repeat."""
        if self.key is not None:
            text = text.replace(self.key.get_secret_value(), "[key]")
        return printable(_CONTROL.sub(" ", text), 200)

    def _headers(self) -> dict[str, Any]:
        """The key of this engine, or no key. OpenAI's client would send the key of the environment to any host."""
        key = Omit() if self.key is None else f"Bearer {self.key.get_secret_value()}"
        account = {} if is_openai(self.base_url) else {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return {"Authorization": key, **account}

    def _client(self) -> AsyncOpenAI:
        """A client that neither tries again nor follows redirects."""
        return AsyncOpenAI(
            api_key="unused",  # `_headers` sets the key
            base_url=self.base_url,
            max_retries=0,
            default_headers=self._headers(),  # against OPENAI_CUSTOM_HEADERS
            http_client=LimitedClient(
                headers={"Accept-Encoding": "gzip, deflate"},
                follow_redirects=False,
                timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout)),
                limits=httpx2.Limits(max_connections=self.max_connections),
                trust_env=not is_loopback(self.base_url),  # a request to this machine needs no proxy
            ),
        )

    async def _post(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The JSON body of the response of `call`, after as many attempts as may help.

        Raises Failed for this request alone, and InputError where no request can succeed: a refused key, an unknown
        model, a redirect, or a server that was never reached.
        """
        if self._gone:
            raise Failed(f"not asked, since the server is out of reach ({self._last_failure})", again=True)

        async def attempt() -> Any:
            self._count(requests=1)
            try:
                async with asyncio.timeout(self.timeout):
                    response = await call()
            except APIStatusError:
                self.reached = True
                raise
            self.reached = True
            return self._body(response.content, response.headers.get("content-type", ""))

        retrying = AsyncRetrying(
            stop=self._stop, wait=self._wait, retry=retry_if_exception(failures.may_pass), reraise=True
        )
        try:
            body: Any = await retrying(attempt)
        except (OpenAIError, httpx2.HTTPError, TimeoutError, ErrorInAnswer, AnswerTooLarge) as error:
            outcome = failures.explain(error, self)
            if isinstance(outcome, Failed) and outcome.again:
                self._unanswered, self._last_failure = self._unanswered + 1, str(outcome)
            else:
                self._unanswered = 0
            raise outcome from None  # the cause holds the request, and the request holds the key
        self._unanswered = 0
        return body

    @property
    def _gone(self) -> bool:
        """Whether the server has left as many requests in a row without an answer as the limit allows; no more are sent."""
        return self._unanswered >= max(OUTAGE, 2 * self.max_connections)

    def _body(self, content: bytes, content_type: str) -> Any:
        """The JSON of an answer. Raises Failed where the answer is not JSON, and ErrorInAnswer where it is an error."""
        try:
            body = json.loads(content)
            body = transport.replace_surrogates(body) if b"\\u" in content else body
        except (ValueError, RecursionError):
            fault = "a stream of events, which was not asked for" if "event-stream" in content_type else "not JSON"
            beginning = self.clean(content[:80].decode("utf-8", "replace"))
            raise Failed(f"the server's answer is not {self.answers} ({fault}): {beginning}") from None
        if isinstance(body, dict) and body.get("error") and not body.get("choices") and not body.get("answers"):
            raise ErrorInAnswer(body)
        return body

    def _accept(self, body: Any, kind: type[A]) -> A:
        """The answer in a body, its tokens and price counted. Raises Failed where the body is no such answer."""
        try:
            answer = kind.model_validate(body)
        except ValidationError as error:
            raise Failed(f"the server's answer is not {self.answers} ({failures.first_fault(error)})") from None
        prompt, cached, completion = answer.tokens
        cost = None if answer.usage is None else price_usd(self.model, self.base_url, prompt, completion, cached)
        self._count(0, prompt, completion, cost)
        return answer

    def _count(self, requests: int, prompt: int = 0, completion: int = 0, cost: float | None = 0.0) -> None:
        with self._lock:
            self.usage.add(requests, prompt, completion, cost)

    def _stop(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if not self.reached and failures.is_unreachable(error) and state.attempt_number >= 2:
            return True  # the address is probably wrong: report it soon
        if isinstance(error, TimeoutError | APITimeoutError) and state.attempt_number >= TIMEOUTS:
            return True
        return state.attempt_number >= self.attempts or (failures.retry_after(error) or 0.0) > failures.LONGEST_WAIT

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: the server's request, or an exponential wait; both with jitter."""
        seconds = failures.retry_after(state.outcome.exception() if state.outcome else None)
        if seconds is not None:
            return seconds + self._jitter.uniform(0, self.backoff)
        return min(30.0, self.backoff * 2 ** (state.attempt_number - 1)) * self._jitter.uniform(0.5, 1.5)

    def _stream(self, items: Sequence[T], ask: Callable[[AsyncOpenAI, T], Awaitable[R]]) -> Iterator[R]:
        """The result of `ask` for each item, in the order of finishing. Raises Outage where the server was lost before."""
        if self._gone:
            raise Outage(f"{self.name}: the last {self._unanswered} requests got no answer: {self._last_failure}")
        yield from transport.stream_results(items, ask, self._client, self.max_connections)


def parse_spec(spec: str, kind: str = "server") -> tuple[str, str]:
    """The model's name and the base URL in `KIND:MODEL@URL`. Raises InputError, whose message shows no password."""
    form = f"{kind}:MODEL@http://host:port/v1"
    match = re.fullmatch(kind + r":(?P<model>\S+?)@(?P<url>https?://\S+)", spec)
    if not match:
        shown = re.sub(r"//\S*@", "//…@", spec)
        raise InputError(f"{shown}: not the name of a server's model; give {form}")
    model, url = match["model"], match["url"].rstrip("/")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if "@" in url:
        raise InputError(f"{kind}:{model}: the address holds a password; set SOLON_API_KEY and give {form}")
    if not host or parts.query or parts.fragment:
        raise InputError(f"{spec}: the address is not one of a server (host, port, path); give {form}")
    return model, url


def price_usd(
    model: str, base_url: str, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0
) -> float | None:
    """US dollars by genai-prices: the price of the vendor at this address, else of the model's maker; None: unknown.

    cached_tokens: the prompt tokens that the server read from its cache.
    """
    used = genai_prices.Usage(
        input_tokens=prompt_tokens, cache_read_tokens=cached_tokens, output_tokens=completion_tokens
    )
    for address in (base_url, None):
        with suppress(LookupError, ValueError):
            return float(genai_prices.calc_price(used, model, provider_api_url=address).total_price)
    return None
