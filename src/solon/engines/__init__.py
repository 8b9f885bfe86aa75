"""The sources of text and log-probabilities: one Protocol, and the engines that follow it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from solon.engines.base import Completion as Completion
from solon.engines.base import Engine as Engine
from solon.engines.base import Failure as Failure
from solon.engines.base import GenerationRequest as GenerationRequest
from solon.engines.base import OnFailure as OnFailure
from solon.engines.base import Question as Question
from solon.engines.base import Sampling as Sampling
from solon.engines.base import ScoreRequest as ScoreRequest
from solon.engines.base import Scores as Scores
from solon.engines.base import ScriptedEngine as ScriptedEngine
from solon.engines.base import Usage as Usage
from solon.plugins import named

GROUP = "solon.engines"  # entry points of other packages; the entry point's name is the scheme
REMOTE = ("server", "systemone")
# Each scheme is a file of this folder with an engine. The names are listed because importing the files takes seconds.
SCHEMES = (*REMOTE, "decision", "judge")
Book = Callable[[int, int, int, float | None], None]  # requests, prompt tokens, completion tokens, US dollars


def scheme_of(spec: str) -> str:
    """The text before the first colon of a spec, if an engine has this name; empty for a plain model."""
    scheme, colon, _ = spec.partition(":")
    known = colon and (scheme in SCHEMES or any(e.name == scheme for e in entry_points(group=GROUP)))
    return scheme if known else ""


def engine_class(scheme: str) -> Any:
    """The engine of a scheme: `ENGINE` in the file of that name in this folder, or an entry point of that name."""
    if scheme in SCHEMES:
        return import_module(f"solon.engines.{scheme}").ENGINE
    return named(GROUP, scheme)


def open_engine(spec: str, *, system: str | None, dtype: str = "auto") -> Engine:
    """The engine for a value of `--model`: the engine of its scheme, or a model in this process where it has none."""
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
    """The directory, file or hub id of a model in this process; None where the spec names no such model."""
    scheme = scheme_of(spec)
    return spec if not scheme else spec.removeprefix("decision:") if scheme == "decision" else None


def model_name(spec: str) -> str:
    """The name of the model in a spec: gpt-5 in `server:gpt-5@https://…`."""
    return spec.partition(":")[2].rpartition("@")[0] or spec if is_remote(spec) else spec


class LazyEngine:
    """An engine that opens at its first use. A stage with no work left therefore loads no model.

    LazyEngine is a context manager: leaving it frees the memory of the model.
    """

    def __init__(self, spec: str, *, system: str | None, dtype: str = "auto") -> None:
        self.name, self.system, self.dtype = spec, system, dtype
        self._opened: Engine | None = None
        self._earlier_usage = Usage()  # of the engines that were closed
        self._book: Book | None = None

    @property
    def engine(self) -> Engine:
        if self._opened is None:
            self._opened = open_engine(self.name, system=self.system, dtype=self.dtype)
            self._opened.usage.book = self._book
        return self._opened

    def book(self, book: Book | None) -> None:
        """Call `book` with all later usage, at the time of each request; None: call nothing."""
        self._book = book
        if self._opened is not None:
            self._opened.usage.book = book

    @property
    def fingerprint(self) -> str:
        return self.engine.fingerprint

    @property
    def usage(self) -> Usage:
        total = Usage()
        for part in (self._earlier_usage, self._opened.usage if self._opened else Usage()):
            total.add(part.requests, part.prompt_tokens, part.completion_tokens, part.cost_usd)
        return total

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> Iterator[Completion]:
        return self.engine.generate(requests, sampling)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        return self.engine.score(requests)

    def __enter__(self) -> LazyEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._opened is not None:
            self._earlier_usage = self.usage
            getattr(self._opened, "close", lambda: None)()
            self._opened = None
            if not is_remote(self.name):
                gc.collect()  # the parts of a model refer to each other; otherwise two models would be in memory
