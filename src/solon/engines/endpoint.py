"""What all engines behind an endpoint share: the address, the key, one retry layer, the ledger, requests side by side.

Requests run beside each other on an event loop in a thread of its own; whoever reads the answers gets each as it
finishes and may stop at any time. There is one retry layer, here, and the client's own is off: otherwise attempts
multiply and the ledger is wrong. Endpoints come from a recipe or the command line only, redirects are not followed,
and a key is sent to its own host alone.
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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import genai_prices
import httpx2
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, Omit, OpenAIError
from pydantic import SecretStr, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from solon.engines.base import Usage
from solon.errors import InputError

LONGEST_WAIT = 300.0  # seconds; a server that asks for more (a spent quota, say) is not waited for

T = TypeVar("T")
R = TypeVar("R")


class Failed(Exception):
    """This one request could not be answered; the message goes into its outcome.

    again: the failure may pass (no connection, a time limit, a busy server), so a later start may ask again.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class Endpoint:
    """`KIND:MODEL@URL`; a subclass says what it asks there."""

    kind: ClassVar[str]  # what its name begins with
    serves: str  # what it needs the server to have, for a person

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key: SecretStr | None = None,
        max_connections: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 0.5,
    ) -> None:
        """timeout: seconds an answer may keep silent. attempts: of one request, the first included.

        backoff: seconds before the second attempt; doubled for each later one, up to 30, with jitter.
        """
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

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

    async def _post(self, call: Callable[[], Awaitable[Any]]) -> bytes:
        """The content that `call`'s response has, tried again where that may help.

        Raises Failed for this request alone, InputError where no request could succeed: a refused key, an unknown
        model, a redirect, and a server that was never reached.
        """

        async def attempt() -> bytes:
            self._count(requests=1)
            try:
                response = await call()
            except APIStatusError:
                self._reached = True
                raise
            self._reached = True
            return response.content

        retrying = AsyncRetrying(stop=self._stop, wait=self._wait, retry=retry_if_exception(_passing), reraise=True)
        try:
            return await retrying(attempt)
        except (OpenAIError, httpx2.HTTPError) as error:
            raise self._outcome(error) from None  # the cause holds the request, and with it the key

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
            return Failed(f"the server did not answer within {self.timeout:g} s", again=True)
        if isinstance(error, APIConnectionError):
            cause = self._clean(str(error.__cause__ or "")) or type(error.__cause__ or error).__name__
            if not self._reached:
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
        return Failed(f"the server answered {status}" + (f": {detail}" if detail else ""), again=_passing(error))

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


def where(error: ValidationError) -> str:
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
