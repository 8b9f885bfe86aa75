"""What made an output: the parts that are compared before a command goes on with what stands there."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solon.constitution import Constitution
from solon.engines import Engine, LazyEngine, is_remote
from solon.engines.weights import directory_of, model_fingerprint, resolve, resolve_dtype
from solon.models.dtype import Work
from solon.publishing import MARK, Identity
from solon.records import Chat, Record, fingerprint

WHOLE = 2 << 30  # bytes: the weight files of a model of up to this size are read whole, those of larger ones in places
DESCRIBES = {MARK, "README.md", ".gitattributes", "COMPLETE"}  # says something of a model and changes nothing in it


def of_model(spec: str) -> dict[str, str]:
    """A model by the content of its files: weights, config, tokenizer, template. A remote one by its address.

    A hub id's files are fetched now where they are not here: the next start would find another model.
    """
    if is_remote(spec):
        return {"name": spec, "fingerprint": fingerprint("remote", spec)}
    return {"name": spec, "fingerprint": of_directory(Path(directory_of(spec.removeprefix("decision:"))))}


def of_engine(engine: Engine, old: Identity) -> dict[str, Any]:
    """The model, the system message and the dtype of an engine. old: the identity of what stands already.

    A `dtype: auto` that is still open is decided here, as the old identity has it: it is measured, and may come out
    otherwise the next time.
    """
    if not isinstance(engine, LazyEngine):
        return {"model": {"name": engine.name, "fingerprint": engine.fingerprint}}
    if not is_remote(engine.name):
        engine.dtype = decided_dtype(engine.dtype, old, engine.name)
        return {"model": of_model(engine.name), "system": engine.system, "dtype": engine.dtype}
    return {"model": of_model(engine.name), "system": engine.system}


def decided_dtype(dtype: str, old: Identity, model: str, work: Work = "generation") -> str:
    """float32 or bfloat16: what was given, or for `auto` what was used before, or else what is faster here."""
    if dtype != "auto":
        return dtype
    if old.get("dtype"):
        return str(old["dtype"])
    return str(resolve_dtype("auto", resolve(model.removeprefix("decision:")), work)).removeprefix("torch.")


def of_constitution(constitution: Constitution) -> dict[str, Any]:
    return {"constitution": {"name": constitution.name, "fingerprint": constitution.fingerprint}}


def of_directory(where: Path) -> str:
    """The fingerprint of a model's directory; its own place and name are no part of it."""
    files = sorted(p for p in where.rglob("*") if p.is_file() and p.name not in DESCRIBES)
    whole = sum(p.stat().st_size for p in files) <= WHOLE
    parts = [
        (path.relative_to(where).as_posix(), _content(path, *_version(path)))
        for path in files
        if whole or path.suffix != ".safetensors"
    ]
    return fingerprint("model", parts, None if whole else model_fingerprint(str(where)))


def of_files(where: Path) -> dict[str, str]:
    """The content of each file in a directory but the mark, by its path in it. A link counts as where it leads."""
    files = [p for p in sorted(where.rglob("*")) if (p.is_symlink() or p.is_file()) and p != where / MARK]
    return {
        p.relative_to(where).as_posix(): f"link to {p.readlink()}" if p.is_symlink() else _content(p, *_version(p))
        for p in files
    }


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.cache
def _content(path: Path, *version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_records(records: Sequence[Record]) -> dict[str, str]:
    """The content of records in their order."""
    return {"name": f"{len(records)} records", "fingerprint": fingerprint("records", [r.to_json() for r in records])}


def of_input(item: Any) -> str:
    """The content that a record is made from, without where it came from."""
    return fingerprint("input", {k: v for k, v in item.to_json().items() if k != "meta"})


def of_inputs(records: Sequence[Record]) -> dict[str, str]:
    """As `of_records`, without where the records came from: made again with the same content they are the same."""
    return {"name": f"{len(records)} records", "fingerprint": fingerprint("inputs", [of_input(r) for r in records])}


def of_chats(chats: Sequence[Chat]) -> dict[str, str]:
    """The content of conversations in their order."""
    found = fingerprint("conversations", [[m.model_dump() for m in chat] for chat in chats])
    return {"name": f"{len(chats)} conversations", "fingerprint": found}
