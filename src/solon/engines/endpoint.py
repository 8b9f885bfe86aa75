"""What all engines behind an endpoint share: the address, the key, one retry layer, the ledger, requests side by side.

Requests run beside each other on an event loop in a thread of its own; whoever reads the answers gets each as it
finishes and may stop at any time. There is one retry layer, here, and the client's own is off: otherwise attempts
multiply and the ledger is wrong. Endpoints come from a recipe or the command line only, redirects are not followed,
and a key is sent to its own host alone (`keys.py`). An answer has a deadline as a whole and a limit on its size.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import genai_prices
import httpx2
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, Omit, OpenAIError
from pydantic import SecretStr, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from solon.engines.base import Usage
from solon.engines.keys import is_loopback, is_openai
from solon.engines.keys import key_for as key_for
from solon.errors import InputError, Outage, printable

LONGEST_WAIT = 300.0  # seconds; a server that asks for more (a spent quota, say) is not waited for
LARGEST_ANSWER = (
    32 << 20
)  # bytes after decompression; a chat completion with all log-probabilities has well under 1 MiB
OUTAGE = 8  # requests in a row that got no answer, each after all its attempts, before an endpoint counts as gone
TIMEOUTS = 2  # attempts of a request whose answer does not come in time
OVERLOADED = re.compile(r"rate|limit|overload|capacity|unavailable|timeout|server_error|internal", re.I)

_UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum context|too many (input )?tokens|(prompt|input|request)[^.]{0,40} too (long|large)"
    r"|exceeds?[^.]{0,60}(context|tokens)|reduce the length",
    re.I,
)

MAX_CONNECTIONS: ContextVar[int | None] = ContextVar("max_connections", default=None)  # of --max-connections
T = TypeVar("T")
R = TypeVar("R")


class Failed(Exception):
    """This one request could not be answered; the message goes into its outcome.

    again: the failure may pass (no connection, a time limit, a busy server), so a later start may ask again. status,
    words, parameter: what the server said, and of which parameter of the request, where it refused it.
    """

    def __init__(
        self, message: str, *, again: bool = False, status: int | None = None, words: str = "", parameter: str = ""
    ) -> None:
        super().__init__(message)
        self.again, self.status, self.words, self.parameter = again, status, words, parameter


class _ErrorInside(Exception):
    """An answer with status 200 that holds an error in place of an answer."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__()
        self.body = body
        inner = body.get("error")
        self.code = inner.get("code", inner.get("type")) if isinstance(inner, dict) else None

    @property
    def passing(self) -> bool:
        if isinstance(self.code, int):
            return self.code in (408, 429) or self.code >= 500
        return isinstance(self.code, str) and bool(OVERLOADED.search(self.code))


class _TooLarge(Exception):
    """An answer that is larger than any answer is, or compressed in a way that was not asked for."""


class _Client(httpx2.AsyncClient):
    """Reads answers whole, up to a size. Compressed ones are unpacked piece by piece, so that none fills the memory."""

    async def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        response = await super().send(request, stream=True, **options)
        try:
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", "gzip", "deflate", ""):
                raise _TooLarge(f"it is compressed as {encoding[:40]!r}, which was not asked for")
            pieces, size = [], 0
            async for piece in response.aiter_bytes():
                size += len(piece)
                if size > LARGEST_ANSWER:
                    raise _TooLarge(f"it is larger than {LARGEST_ANSWER >> 20} MiB")
                pieces.append(piece)
        finally:
            await response.aclose()
        told = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(k, v) for k, v in response.headers.multi_items() if k.lower() not in told]
        return httpx2.Response(response.status_code, headers=headers, content=b"".join(pieces), request=request)


class Endpoint:
    """`KIND:MODEL@URL`; a subclass says what it asks there."""

    kind: ClassVar[str]  # what its name begins with
    serves: str  # what it needs the server to have, for a person
    answers: ClassVar[str]  # what it needs an answer to be

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
        """max_connections: requests under way at once; None: SOLON_MAX_CONNECTIONS or 8. timeout: seconds from a
        request to the end of its answer; None: SOLON_TIMEOUT or 120. attempts: of one request, the first included.

        backoff: seconds before the second attempt; doubled for each later one, up to 30, with jitter.
        """
        if max_connections is None:
            max_connections = MAX_CONNECTIONS.get()
        if max_connections is None:
            max_connections = int(_from_environment("SOLON_MAX_CONNECTIONS", 8, whole=True))
        timeout = _from_environment("SOLON_TIMEOUT", 120.0) if timeout is None else timeout
        if max_connections < 1 or attempts < 1 or timeout <= 0:
            raise InputError("max_connections, attempts and timeout of a server must be above 0")
        self.model, self.base_url = model, base_url
        self.name = f"{self.kind}:{model}@{base_url}"
        self.max_connections, self.timeout = max_connections, timeout
        self.attempts, self.backoff = attempts, backoff
        self.usage = Usage()  # requests: every attempt made, those that failed included
        self._key = key
        self._lock = threading.Lock()  # over usage: two generators may be read at once
        self._jitter = random.Random()  # its own, so that the seeded global one is left alone
        self._reached = False  # the server has answered something, be it an error
        self._unanswered = 0  # requests in a row that got no answer
        self._why = ""  # the last of them

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.name}: an endpoint is not pickled, since it may hold a key; load it where it is used")

    def _headers(self) -> dict[str, Any]:
        """This engine's key or none; OpenAI's client would send the environment's to any host."""
        key = Omit() if self._key is None else f"Bearer {self._key.get_secret_value()}"
        account = {} if is_openai(self.base_url) else {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return {"Authorization": key, **account}

    def _client(self) -> AsyncOpenAI:
        """A client that neither tries again nor follows redirects."""
        return AsyncOpenAI(
            api_key="unused",  # `_headers` has it
            base_url=self.base_url,
            max_retries=0,
            default_headers=self._headers(),  # against OPENAI_CUSTOM_HEADERS
            http_client=_Client(
                headers={"Accept-Encoding": "gzip, deflate"},
                follow_redirects=False,
                timeout=httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout)),
                limits=httpx2.Limits(max_connections=self.max_connections),
                trust_env=not is_loopback(self.base_url),  # no proxy stands before this machine itself
            ),
        )

    async def _post(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The JSON that `call`'s response holds, tried again where that may help.

        Raises Failed for this request alone, InputError where no request could succeed: a refused key, an unknown
        model, a redirect, and a server that was never reached.
        """
        if self._gone:
            raise Failed(f"not asked, since the server is out of reach ({self._why})", again=True)

        async def attempt() -> Any:
            self._count(requests=1)
            try:
                async with asyncio.timeout(self.timeout):
                    response = await call()
            except APIStatusError:
                self._reached = True
                raise
            self._reached = True
            return self._read(response.content, response.headers.get("content-type", ""))

        retrying = AsyncRetrying(stop=self._stop, wait=self._wait, retry=retry_if_exception(_passing), reraise=True)
        try:
            found: Any = await retrying(attempt)
        except (OpenAIError, httpx2.HTTPError, TimeoutError, _ErrorInside, _TooLarge) as error:
            outcome = self._outcome(error)
            if isinstance(outcome, Failed) and outcome.again:
                self._unanswered, self._why = self._unanswered + 1, str(outcome)
            else:
                self._unanswered = 0
            raise outcome from None  # the cause holds the request, and with it the key
        self._unanswered = 0
        return found

    @property
    def _gone(self) -> bool:
        """So many requests in a row got no answer that more of them would get none either."""
        return self._unanswered >= max(OUTAGE, 2 * self.max_connections)

    def _read(self, content: bytes, kind: str) -> Any:
        """The JSON of an answer. Raises Failed where it holds none, and _ErrorInside where it holds an error."""
        try:
            body = json.loads(content)
            body = _whole_characters(body) if b"\\u" in content else body
        except (ValueError, RecursionError):
            what = "a stream of events, which was not asked for" if "event-stream" in kind else "not JSON"
            begins = self._clean(content[:80].decode("utf-8", "replace"))
            raise Failed(f"the server's answer is not {self.answers} ({what}): {begins}") from None
        if isinstance(body, dict) and body.get("error") and not body.get("choices") and not body.get("answers"):
            raise _ErrorInside(body)
        return body

    def _count(self, requests: int, prompt: int = 0, completion: int = 0, cost: float | None = 0.0) -> None:
        with self._lock:
            self.usage.add(requests, prompt, completion, cost)

    def _stop(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if not self._reached and _unreachable(error) and state.attempt_number >= 2:
            return True  # most likely a wrong address: say so soon
        if isinstance(error, TimeoutError | APITimeoutError) and state.attempt_number >= TIMEOUTS:
            return True
        return state.attempt_number >= self.attempts or (_retry_after(error) or 0.0) > LONGEST_WAIT

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: what the server asks for, or exponential; both with jitter."""
        asked = _retry_after(state.outcome.exception() if state.outcome else None)
        if asked is not None:
            return asked + self._jitter.uniform(0, self.backoff)
        return min(30.0, self.backoff * 2 ** (state.attempt_number - 1)) * self._jitter.uniform(0.5, 1.5)

    def _outcome(self, error: Exception) -> Exception:
        """What to raise for an error that attempts did not cure."""
        if isinstance(error, _ErrorInside):
            words = self._clean(_detail(error.body))
            return self._refusal(200, f"the server answered an error: {words}", words, error.body, error.passing)
        if isinstance(error, TimeoutError) or (isinstance(error, APITimeoutError) and not _unreachable(error)):
            return Failed(f"the server did not answer within {self.timeout:g} s", again=True)
        if isinstance(error, _TooLarge):
            return Failed(f"the server's answer is not {self.answers}: {error}")
        if isinstance(error, APIConnectionError):
            cause = self._clean(str(error.__cause__ or "")) or type(error.__cause__ or error).__name__
            if not self._reached and _unreachable(error):
                return InputError(f"{self.name}: no server answers there ({cause}); start it, or correct the address")
            return Failed(f"the connection to the server failed ({cause})", again=True)
        if not isinstance(error, APIStatusError):
            return Failed(f"the server's answer could not be read ({type(error).__name__})")
        status = error.status_code
        if status in (401, 403):
            return InputError(f"{self.name}: {self._refused()} ({status}); {self._key_advice()}")
        if status == 404:
            return InputError(
                f'{self.name}: the server has no model "{self.model}", or no {self.serves} there (404); '
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
        said = f"the server answered {status}" + (f": {detail}" if detail else "")
        return self._refusal(status, said, detail, error.body, _passing(error))

    def _refusal(self, status: int, said: str, words: str, body: Any, again: bool) -> Failed:
        inner = body.get("error", body) if isinstance(body, dict) else None
        parameter = inner.get("param") if isinstance(inner, dict) else None
        if _TOO_LONG.search(words):
            return Failed(f"too long for the server: {words}", status=status, words=words)
        return Failed(
            said, again=again, status=status, words=words, parameter=parameter if isinstance(parameter, str) else ""
        )

    def _refused(self) -> str:
        return "the server refused the key" if self._key else "the server wants a key"

    def _key_advice(self) -> str:
        host = urlsplit(self.base_url).hostname
        if self._key is None and os.environ.get("OPENAI_API_KEY"):
            return f"OPENAI_API_KEY goes to OpenAI only; set SOLON_API_KEY to the key for {host}"
        return f"set SOLON_API_KEY to a key that {host} accepts, or SOLON_API_KEYS where there are several hosts"

    def _clean(self, text: str) -> str:
        """A server's words on one printable line, without the key that some servers repeat."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "[key]")
        return printable(_UNPRINTED.sub(" ", text), 200)

    def _stream(self, items: Sequence[T], ask: Callable[[AsyncOpenAI, T], Awaitable[R]]) -> Iterator[R]:
        """`ask` of each item, as they finish, at most `max_connections` at a time.

        Leaving the iterator, by Ctrl-C or otherwise, cancels what is under way. Raises Outage where the server went out
        of reach before: what was asked together with the requests that showed it has been answered or failed by then.
        """
        if self._gone:
            raise Outage(f"{self.name}: the last {self._unanswered} requests got no answer: {self._why}")
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


def parse_spec(spec: str, kind: str = "server") -> tuple[str, str]:
    """The model's name and the base URL out of `KIND:MODEL@URL`. Raises InputError, without passwords."""
    form = f"{kind}:MODEL@http://host:port/v1"
    found = re.fullmatch(kind + r":(?P<model>\S+?)@(?P<url>https?://\S+)", spec)
    if not found:
        shown = re.sub(r"//\S*@", "//…@", spec)
        raise InputError(f"{shown}: not the name of a server's model; give {form}")
    model, url = found["model"], found["url"].rstrip("/")
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


def _passing(error: BaseException) -> bool:
    """Another attempt may succeed."""
    if isinstance(error, APIStatusError):
        return error.status_code in (408, 429) or error.status_code >= 500
    if isinstance(error, _ErrorInside):
        return error.passing
    return isinstance(error, APIConnectionError | TimeoutError)


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
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _detail(body: Any) -> str:
    """The server's own words, out of the shapes that servers use."""
    while isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail")
    return body if isinstance(body, str) else "" if body is None else str(body)


def where(error: ValidationError) -> str:
    """The first thing wrong, without the server's own words: `choices: Field required`."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(p) for p in first["loc"])
    return f"{place}: {first['msg']}" if place else "not JSON"


def _from_environment(name: str, otherwise: float, *, whole: bool = False) -> float:
    """A number above 0 that the environment sets."""
    text = os.environ.get(name, "").strip()
    try:
        value = (int(text) if whole else float(text)) if text else otherwise
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise InputError(f'{name}: "{text}" is not a {"whole " if whole else ""}number above 0')
    return value


def _whole_characters(value: Any) -> Any:
    """The same JSON with each half of a surrogate pair replaced: no file could hold it."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    return {key: _whole_characters(item) for key, item in value.items()} if isinstance(value, dict) else value
