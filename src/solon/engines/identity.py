"""What made an output: its models and engines, which are compared before a command goes on with what stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from solon.engines import Engine, LazyEngine, model_directory
from solon.models.dtype import Work
from solon.models.weights import directory_of, resolve, resolve_dtype
from solon.publishing import Identity
from solon.publishing.content import of_directory
from solon.records import fingerprint


def of_model(spec: str) -> dict[str, str]:
    """A model by the content of its files: weights, config, tokenizer, template. A remote one by its address.

    A hub id's files are fetched now where they are not here: the next start would find another model.
    """
    where = model_directory(spec)
    if where is None:
        return {"name": spec, "fingerprint": fingerprint("remote", spec)}
    return {"name": spec, "fingerprint": of_directory(Path(directory_of(where)))}


def of_engine(engine: Engine, old: Identity) -> dict[str, Any]:
    """The model, the system message and the dtype of an engine. old: the identity of what stands already.

    A `dtype: auto` that is still open is decided here, as the old identity has it: it is measured, and may come out
    otherwise the next time.
    """
    if not isinstance(engine, LazyEngine):
        return {"model": {"name": engine.name, "fingerprint": engine.fingerprint}}
    if model_directory(engine.name) is not None:
        engine.dtype = decided_dtype(engine.dtype, old, engine.name)
        return {"model": of_model(engine.name), "system": engine.system, "dtype": engine.dtype}
    return {"model": of_model(engine.name), "system": engine.system}


def decided_dtype(dtype: str, old: Identity, model: str, work: Work = "generation") -> str:
    """float32 or bfloat16: what was given, or for `auto` what was used before, or else what is faster here."""
    if dtype != "auto":
        return dtype
    if old.get("dtype"):
        return str(old["dtype"])
    return str(resolve_dtype("auto", resolve(model_directory(model) or model), work)).removeprefix("torch.")
