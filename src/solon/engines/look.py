"""A check of every model that a command names, before any work: the model exists and can do what the command asks of it.

Nothing is loaded. Solon looks for a directory and a GGUF file on disk, for a hub id in the hub's cache or with one short
request to the hub, and asks a server with one short request for its models. The first fault is one InputError within seconds.
A server that has no list of models, or that is slow with the list, passes the check.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from solon.engines import REMOTE, model_directory, scheme_of
from solon.engines.keys import check_keys, is_loopback, key_for
from solon.errors import InputError, nearest, printable

TINY = "tiny-random"  # a run makes this model itself
SECONDS = 5.0  # a server or the hub must answer within this time
T = TypeVar("T")


def look_at(models: Mapping[str, str], *, trained: tuple[str, ...] = ()) -> None:
    """Raises InputError for the first model that cannot be used. The message has the name that the user gave.

    models: option or recipe key → model. trained: the keys of the models whose weights are trained; these models must
    run in this process.
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
    specs = dict.fromkeys(models.values())
    servers = {spec: parse_spec(spec, scheme) for spec in specs if (scheme := scheme_of(spec)) in REMOTE}
    check_keys(url for _, url in servers.values())
    for spec in specs:
        if spec in servers:
            _server(spec, *servers[spec])
        elif spec != TINY and (directory := model_directory(spec)) is not None:
            _local(directory)


def _local(spec: str) -> None:
    from solon.models.weights import SMOLLM2_GGUF_SHA256, cache_path, resolve, wheel_gguf

    path = Path(spec).expanduser()
    if spec == "smollm2" and (wheel_gguf() or (cache_path(SMOLLM2_GGUF_SHA256) / "COMPLETE").is_file()):
        return  # the conversion may take a while, so it waits until the model is loaded
    if path.suffix == ".gguf" and path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{spec}: its name ends in .gguf but it is no GGUF file; fetch it again")
        return
    where = resolve(spec)
    if not Path(where).is_dir():
        _hub(where)


def _hub(spec: str) -> None:
    """Raises InputError for a hub id that is neither in the hub's cache on this machine nor on the hub."""
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
    """Raises InputError for a server that cannot be reached, that refuses the key, or that does not list the model."""
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
        return  # the server is there, and busy or of another kind; a later request will show its fault
    if status in (401, 403) and key:
        raise InputError(f"{spec}: the server refused the key ({status}); set SOLON_API_KEY to one that it accepts")
    known = _listed(content) if status == 200 else []
    if known and not any(name == model or "*" in name or name.split(":")[0] == model.split(":")[0] for name in known):
        some = ", ".join(printable(name, 60) for name in known[:5])
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        raise InputError(f'{spec}: the server has no model "{model}"; it has {some}{more}{nearest(model, known)}')


def _listed(content: bytes) -> list[str]:
    """The model names in an answer to GET /models; empty where the answer is no such list."""
    try:
        return [row["id"] for row in json.loads(content)["data"] if isinstance(row["id"], str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _soon(ask: Callable[[], T]) -> T:
    """The result of `ask`. Raises TimeoutError after SECONDS + 1; a host name that does not resolve would take longer."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="solon-look").start()
    return future.result(timeout=SECONDS + 1)
