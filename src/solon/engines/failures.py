"""A failed request to an endpoint: whether another attempt may help, and the message for the person or the record."""

from __future__ import annotations

import math
import os
import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
from openai import APIConnectionError, APIStatusError, APITimeoutError
from pydantic import ValidationError

from solon.engines.transport import AnswerTooLarge
from solon.errors import InputError

if TYPE_CHECKING:
    from solon.engines.endpoint import Endpoint

LONGEST_WAIT = 300.0  # seconds; a server that asks for a longer wait (its quota is spent, say) is not waited for
OVERLOADED = re.compile(r"rate|limit|overload|capacity|unavailable|timeout|server_error|internal", re.I)
TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum context|too many (input )?tokens|(prompt|input|request)[^.]{0,40} too (long|large)"
    r"|exceeds?[^.]{0,60}(context|tokens)|reduce the length",
    re.I,
)


class Failed(Exception):
    """One request could not be answered; the other requests go on. The outcome of the request holds the message.

    again: the failure may pass (no connection, a time limit, a busy server), so a later start may ask again. status,
    words, parameter: the HTTP status, the server's message, and the parameter of the request that the server refused.
    """

    def __init__(
        self, message: str, *, again: bool = False, status: int | None = None, words: str = "", parameter: str = ""
    ) -> None:
        super().__init__(message)
        self.again, self.status, self.words, self.parameter = again, status, words, parameter


class ErrorInAnswer(Exception):
    """The answer has status 200 and holds an error in place of a result."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__()
        self.body = body
        error = body.get("error")
        self.code = error.get("code", error.get("type")) if isinstance(error, dict) else None


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, ErrorInAnswer) and isinstance(error.code, str):
        return bool(OVERLOADED.search(error.code))
    status = error.code if isinstance(error, ErrorInAnswer) else getattr(error, "status_code", None)
    if isinstance(error, ErrorInAnswer | APIStatusError):
        return isinstance(status, int) and (status in (408, 429) or status >= 500)
    return isinstance(error, APIConnectionError | TimeoutError)


def is_unreachable(error: BaseException | None) -> bool:
    """Whether no connection to the server was made at all."""
    cause = error.__cause__ if isinstance(error, APIConnectionError) else None
    return isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asks Solon to wait: a number or an HTTP date (RFC 9110, section 10.2.3)."""
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


def explain(error: Exception, endpoint: Endpoint) -> Failed | InputError:
    """The exception to raise after the last attempt: Failed for this request alone, InputError if no request can succeed."""
    if isinstance(error, ErrorInAnswer):
        words = endpoint.clean(_message(error.body))
        return _refusal(200, f"the server answered an error: {words}", words, error.body, may_pass(error))
    if isinstance(error, TimeoutError) or (isinstance(error, APITimeoutError) and not is_unreachable(error)):
        return Failed(f"the server did not answer within {endpoint.timeout:g} s", again=True)
    if isinstance(error, AnswerTooLarge):
        return Failed(f"the server's answer is not {endpoint.answers}: {error}")
    if isinstance(error, APIConnectionError):
        cause = endpoint.clean(str(error.__cause__ or "")) or type(error.__cause__ or error).__name__
        if not endpoint.reached and is_unreachable(error):
            return InputError(f"{endpoint.name}: no server answers there ({cause}); start it, or correct the address")
        return Failed(f"the connection to the server failed ({cause})", again=True)
    if not isinstance(error, APIStatusError):
        return Failed(f"the server's answer could not be read ({type(error).__name__})")
    if hopeless := _hopeless(error, endpoint):
        return InputError(f"{endpoint.name}: {hopeless}")
    detail = endpoint.clean(_message(error.body))
    wait = retry_after(error)
    if wait and wait > LONGEST_WAIT:
        detail = f"asks to wait {wait:.0f} s" + (f": {detail}" if detail else "")
    message = f"the server answered {error.status_code}" + (f": {detail}" if detail else "")
    return _refusal(error.status_code, message, detail, error.body, may_pass(error))


def _hopeless(error: APIStatusError, endpoint: Endpoint) -> str | None:
    """The message of a status that every request would get: a refused key, an unknown model, a redirect."""
    status = error.status_code
    if status in (401, 403):
        refused = "the server refused the key" if endpoint.key else "the server wants a key"
        return f"{refused} ({status}); {_key_advice(endpoint)}"
    if status == 404:
        return (
            f'the server has no model "{endpoint.model}", or no {endpoint.serves} there (404); '
            f"see what it has: curl {endpoint.base_url}/models"
        )
    if 300 <= status < 400:
        address = endpoint.clean(error.response.headers.get("location", "nowhere"))
        return f"the server redirects to {address} ({status}), which is not followed; give the final address"
    return None


def _key_advice(endpoint: Endpoint) -> str:
    host = urlsplit(endpoint.base_url).hostname
    if endpoint.key is None and os.environ.get("OPENAI_API_KEY"):
        return f"OPENAI_API_KEY goes to OpenAI only; set SOLON_API_KEY to the key for {host}"
    return f"set SOLON_API_KEY to a key that {host} accepts, or SOLON_API_KEYS where there are several hosts"


def _refusal(status: int, message: str, words: str, body: Any, again: bool) -> Failed:
    error = body.get("error", body) if isinstance(body, dict) else None
    parameter = error.get("param") if isinstance(error, dict) else None
    if TOO_LONG.search(words):
        return Failed(f"too long for the server: {words}", status=status, words=words)
    parameter = parameter if isinstance(parameter, str) else ""
    return Failed(message, again=again, status=status, words=words, parameter=parameter)


def _message(body: Any) -> str:
    """The server's own message. Servers put it under different keys."""
    while isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail")
    return body if isinstance(body, str) else "" if body is None else str(body)


def first_fault(error: ValidationError) -> str:
    """The first fault with its field and without the server's text: `choices: Field required`."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    return f"{field}: {fault['msg']}" if field else "not JSON"
