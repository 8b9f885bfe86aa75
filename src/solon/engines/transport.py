"""HTTP for the engines behind an endpoint: a client that limits the size of an answer, and requests that run in parallel."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import httpx2
from openai import AsyncOpenAI

from solon.errors import InputError

LARGEST_ANSWER = 32 << 20  # bytes after decompression; a chat completion with log-probabilities has well under 1 MiB
T = TypeVar("T")
R = TypeVar("R")


class AnswerTooLarge(Exception):
    """The answer exceeds LARGEST_ANSWER, or has a compression that Solon did not ask for."""


class LimitedClient(httpx2.AsyncClient):
    """Reads each answer as a whole, up to LARGEST_ANSWER. A compressed answer is unpacked in pieces, to limit memory."""

    async def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        response = await super().send(request, stream=True, **options)
        try:
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", "gzip", "deflate", ""):
                raise AnswerTooLarge(f"it is compressed as {encoding[:40]!r}, which was not asked for")
            pieces, size = [], 0
            async for piece in response.aiter_bytes():
                size += len(piece)
                if size > LARGEST_ANSWER:
                    raise AnswerTooLarge(f"it is larger than {LARGEST_ANSWER >> 20} MiB")
                pieces.append(piece)
        finally:
            await response.aclose()
        encoded = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in encoded]
        return httpx2.Response(response.status_code, headers=headers, content=b"".join(pieces), request=request)


def stream_results(
    items: Sequence[T],
    ask: Callable[[AsyncOpenAI, T], Awaitable[R]],
    open_client: Callable[[], AsyncOpenAI],
    max_connections: int,
) -> Iterator[R]:
    """The result of `ask` for each item, in the order of finishing. At most `max_connections` items run at a time.

    The requests run on an event loop in a thread. If the reader leaves the iterator, by Ctrl-C for example, the
    requests under way are cancelled. An exception of `ask` is raised here.
    """
    results: queue.SimpleQueue[tuple[R] | None] = queue.SimpleQueue()

    async def work() -> None:
        waiting = iter(items)  # the workers share the iterator: each takes the next item when it is free

        async def worker() -> None:
            for item in waiting:
                results.put((await ask(client, item),))

        try:
            async with open_client() as client, asyncio.TaskGroup() as group:
                for _ in range(min(max_connections, len(items))):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    loop = asyncio.new_event_loop()
    task = loop.create_task(work())
    task.add_done_callback(lambda _: results.put(None))

    def run() -> None:
        with suppress(BaseException):  # `task.result()` below raises the exception in the reader's thread
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


def number_from_environment(name: str, default: float, *, whole: bool = False) -> float:
    """The number above 0 in an environment variable. Raises InputError for any other text."""
    text = os.environ.get(name, "").strip()
    try:
        value = (int(text) if whole else float(text)) if text else default
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise InputError(f'{name}: "{text}" is not a {"whole " if whole else ""}number above 0')
    return value


def replace_surrogates(value: Any) -> Any:
    """The JSON value with each lone half of a surrogate pair replaced, because no file can hold one."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    return {key: replace_surrogates(item) for key, item in value.items()} if isinstance(value, dict) else value
