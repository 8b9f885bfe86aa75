"""A look at every model that a command names, before anything is done: is it there, and can it be what it is named for?

Nothing is loaded. A directory and a GGUF file are looked at on disk, a hub id in the cache of the hub or with one short
request, a server with one short request for its models. What is wrong is one InputError within seconds; a server without
a list of models, or one that is slow with it, is let be.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from solon.engines import model_directory, scheme_of
from solon.engines.keys import check_keys, is_loopback, key_for
from solon.errors import InputError, nearest, printable

REMOTE = ("server:", "systemone:")  # endpoints, which are asked for their models
TINY = "tiny-random"  # made on the spot by a run
SECONDS = 5.0  # for a server or the hub to answer
T = TypeVar("T")


def look_at(models: Mapping[str, str], *, trained: tuple[str, ...] = ()) -> None:
    """Raises InputError for the first model that cannot be used, under the name it was given by.

    models: what names each model (an option, a recipe's key), to what was given. trained: of those, the ones whose
    weights are trained, which must be in this process.
    """
    from solon.engines.endpoint import parse_spec

    for name, spec in models.items():
        if not spec.strip():
            raise InputError(f"{name}: the name of the model is empty; give smollm2, a directory or a hub id")
        if name in trained and scheme_of(spec):
            raise InputError(
                f"{name} {spec}: this model is trained, so it must run in this process; give smollm2, a directory, "
                "a .gguf file or a hub id"
            )
    urls = [parse_spec(spec, spec.partition(":")[0]) for spec in models.values() if spec.startswith(REMOTE)]
    check_keys(url for _, url in urls)
    for spec in dict.fromkeys(models.values()):
        if spec.startswith(REMOTE):
            _server(spec, *parse_spec(spec, spec.partition(":")[0]))
        elif spec != TINY and (where := model_directory(spec)) is not None:
            _local(where)


def _local(spec: str) -> None:
    from solon.models.weights import SMOLLM2_GGUF_SHA256, cache_path, resolve, wheel_gguf

    path = Path(spec).expanduser()
    if spec == "smollm2" and (wheel_gguf() or (cache_path(SMOLLM2_GGUF_SHA256) / "COMPLETE").is_file()):
        return  # converting it may take a while, and is done when it is loaded
    if path.suffix == ".gguf" and path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{spec}: its name ends in .gguf but it is no GGUF file; fetch it again")
        return
    where = resolve(spec)
    if not Path(where).is_dir():
        _hub(where)


def _hub(spec: str) -> None:
    """Raises InputError for a hub id that is neither in the hub's cache here nor to be had from the hub."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(spec, "config.json"), str):
        return
    mistyped = "if a directory is meant, it is not there"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{spec}: not in the hub's cache on this machine, and HF_HUB_OFFLINE is set; {mistyped}")
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token and constants.ENDPOINT.startswith("https://") else {}
    url = f"{constants.ENDPOINT}/api/models/{spec}"
    try:
        status = _soon(lambda: httpx2.get(url, headers=headers, timeout=SECONDS, follow_redirects=True).status_code)
    except (httpx2.HTTPError, TimeoutError) as error:
        why = type(error).__name__
        raise InputError(f"{spec}: not on this machine, and the hub cannot be reached ({why}); {mistyped}") from None
    if status in (401, 403, 404):
        raise InputError(f"{spec}: the hub has no such model, or it asks for a login (hf auth login); {mistyped}")


def _server(spec: str, model: str, base_url: str) -> None:
    """Raises InputError for a server that no connection reaches, that refuses the key, or that does not list the model."""
    key = key_for(base_url)
    base = base_url.removesuffix("/systemone").removesuffix("/decisions")
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key.get_secret_value()}"} if key else {})}

    def ask() -> tuple[int, Any]:
        content = b""
        with (
            httpx2.Client(trust_env=not is_loopback(base), timeout=SECONDS) as client,
            client.stream("GET", f"{base}/models", headers=headers) as response,
        ):
            for piece in response.iter_raw():
                content += piece
                if len(content) > 4 << 20:
                    break
            return response.status_code, content

    try:
        status, content = _soon(ask)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        cause = printable(str(error), 120) or type(error).__name__
        raise InputError(f"{spec}: no server answers there ({cause}); start it, or correct the address") from None
    except (httpx2.HTTPError, TimeoutError):
        return  # it is there, and busy or of another kind; what it makes of a request will be said
    if status in (401, 403) and key:
        raise InputError(f"{spec}: the server refused the key ({status}); set SOLON_API_KEY to one that it accepts")
    known = _listed(content) if status == 200 else []
    if known and not any(name == model or "*" in name or name.split(":")[0] == model.split(":")[0] for name in known):
        some = ", ".join(printable(name, 60) for name in known[:5])
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        raise InputError(f'{spec}: the server has no model "{model}"; it has {some}{more}{nearest(model, known)}')


def _listed(content: bytes) -> list[str]:
    """The names in an answer to GET /models; none where it is no such list."""
    try:
        found = json.loads(content)
        return [row["id"] for row in found["data"] if isinstance(row["id"], str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _soon(ask: Callable[[], T]) -> T:
    """What `ask` returns, within a bit more than SECONDS; a name that no server resolves would take longer."""
    answer: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put((ask(), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=work, daemon=True, name="solon-look").start()
    try:
        found, error = answer.get(timeout=SECONDS + 1)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]
