"""Where text and log-probabilities come from: one Protocol, a few engines."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from solon.engines.base import (
    Completion,
    Engine,
    Failure,
    GenerationRequest,
    OnFailure,
    Question,
    Sampling,
    ScoreRequest,
    Scores,
    ScriptedEngine,
    Usage,
)
from solon.plugins import named

__all__ = [
    "Completion",
    "Engine",
    "Failure",
    "GenerationRequest",
    "LazyEngine",
    "OnFailure",
    "Question",
    "Sampling",
    "ScoreRequest",
    "Scores",
    "ScriptedEngine",
    "Usage",
    "is_remote",
    "model_directory",
    "model_name",
    "open_engine",
    "scheme_of",
]

GROUP = "solon.engines"  # entry points of other packages, by the name of the scheme
REMOTE = ("server", "systemone")
# Files of this folder that hold an engine of their name. They are listed because importing them takes seconds.
SCHEMES = (*REMOTE, "decision", "judge")
Book = Callable[[int, int, int, float | None], None]  # requests, prompt tokens, completion tokens, US dollars


def scheme_of(spec: str) -> str:
    """What stands before the first colon of a spec, where an engine of that name is there; empty for a plain model."""
    scheme, colon, _ = spec.partition(":")
    known = colon and (scheme in SCHEMES or any(e.name == scheme for e in entry_points(group=GROUP)))
    return scheme if known else ""


def engine_class(scheme: str) -> Any:
    """The engine behind a scheme: `ENGINE` in the file of that name in this folder, or an entry point of that name."""
    if scheme in SCHEMES:
        return import_module(f"solon.engines.{scheme}").ENGINE
    return named(GROUP, scheme)


def open_engine(spec: str, *, system: str | None, dtype: str = "auto") -> Engine:
    """The engine behind what `--model` takes: a scheme of `SCHEMES` or of another package, or else a model in this process."""
    if scheme := scheme_of(spec):
        engine: Engine = engine_class(scheme).open(spec, system=system, dtype=dtype)
        return engine
    from solon.engines.local import LocalEngine

    return LocalEngine.load(spec, dtype=dtype, system=system)


def is_remote(spec: str) -> bool:
    """Whether the model runs behind an endpoint, and may cost money."""
    scheme = scheme_of(spec)
    return scheme in REMOTE or (scheme not in ("", *SCHEMES) and bool(getattr(engine_class(scheme), "remote", False)))


def model_directory(spec: str) -> str | None:
    """What of a spec names a directory, a file or a hub id of a model in this process; None where there is none."""
    scheme = scheme_of(spec)
    return spec if not scheme else spec.removeprefix("decision:") if scheme == "decision" else None


def model_name(spec: str) -> str:
    """The model's name in what `--model` takes: `server:gpt-5@https://…` is gpt-5."""
    return spec.partition(":")[2].rpartition("@")[0] or spec if is_remote(spec) else spec


class LazyEngine:
    """An engine that is opened when first asked, so that a stage with nothing left to do loads no model.

    A context manager: leaving it gives the model's memory back.
    """

    def __init__(self, spec: str, *, system: str | None, dtype: str = "auto") -> None:
        self.name, self.system, self.dtype = spec, system, dtype
        self._opened: Engine | None = None
        self._before = Usage()  # of engines that were closed
        self._book: Book | None = None

    @property
    def engine(self) -> Engine:
        if self._opened is None:
            self._opened = open_engine(self.name, system=self.system, dtype=self.dtype)
            self._opened.usage.book = self._book
        return self._opened

    def book(self, where: Book | None) -> None:
        """Tell `where` of all usage from now on, as it happens; None: tell nobody."""
        self._book = where
        if self._opened is not None:
            self._opened.usage.book = where

    @property
    def fingerprint(self) -> str:
        return self.engine.fingerprint

    @property
    def usage(self) -> Usage:
        total = Usage()
        for u in (self._before, self._opened.usage if self._opened else Usage()):
            total.add(u.requests, u.prompt_tokens, u.completion_tokens, u.cost_usd)
        return total

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        return self.engine.generate(requests, sampling)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        return self.engine.score(requests)

    def __enter__(self) -> LazyEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._opened is not None:
            self._before = self.usage
            getattr(self._opened, "close", lambda: None)()
            self._opened = None
            if not is_remote(self.name):
                gc.collect()  # a model's parts hold each other: without it the next one stands beside the old
