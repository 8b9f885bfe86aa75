"""The identity of the models and engines behind an output, compared before a command continues an existing output."""

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
    """The name of a model and a hash of its files (weights, config, tokenizer, template); of a remote model, its address.

    The files of a hub id are fetched here if they are missing. Otherwise the next start would find another model.
    """
    directory = model_directory(spec)
    content = fingerprint("remote", spec) if directory is None else of_directory(Path(directory_of(directory)))
    return {"name": spec, "fingerprint": content}


def of_engine(engine: Engine, old: Identity) -> dict[str, Any]:
    """The model, the system message and the dtype of an engine. old: the identity of the existing output.

    An open `dtype: auto` is decided here, as the old identity has it. Solon measures the faster dtype, and the next
    measurement may give the other one.
    """
    if not isinstance(engine, LazyEngine):
        return {"model": {"name": engine.name, "fingerprint": engine.fingerprint}}
    if model_directory(engine.name) is None:
        return {"model": of_model(engine.name), "system": engine.system}
    engine.dtype = decided_dtype(engine.dtype, old, engine.name)
    return {"model": of_model(engine.name), "system": engine.system, "dtype": engine.dtype}


def decided_dtype(dtype: str, old: Identity, model: str, work: Work = "generation") -> str:
    """float32 or bfloat16: the given dtype, or for `auto` the dtype used before, or else the faster one on this machine."""
    if dtype != "auto":
        return dtype
    if old.get("dtype"):
        return str(old["dtype"])
    return str(resolve_dtype("auto", resolve(model_directory(model) or model), work)).removeprefix("torch.")
