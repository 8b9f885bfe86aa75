"""The run directory: what wraps files, resume, progress and cost around every stage, the same way for each.

DIR/recipe.yaml and DIR/constitution.yaml as resolved; DIR/<stage>/records.jsonl, the journal; DIR/<stage>/stage.json,
counts, tokens, seconds, cost and versions; DIR/models/<name>, complete models; DIR/report.{md,html}.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from solon import __version__
from solon.constitution import Constitution, load_constitution, to_yaml
from solon.engines import is_remote
from solon.engines.base import Engine, Usage
from solon.errors import InputError
from solon.records import Record
from solon.runs.journal import Journal
from solon.runs.progress import progress_line, training_line
from solon.runs.recipe import Recipe, dump_recipe, load_recipe
from solon.terminal import Console
from solon.training import Progress, give_memory_back

R = TypeVar("R", bound=Record)
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


class Run:
    """One run directory, open for work. Use as a context manager: two processes cannot work on the same one."""

    def __init__(self, recipe: Recipe, out: Path, *, quiet: bool = False) -> None:
        self.recipe, self.dir = recipe, out
        self.constitution: Constitution = load_constitution(recipe.constitution)
        self.console = Console(stderr=True, quiet=quiet)
        self.ledger: list[dict[str, Any]] = []

    def __enter__(self) -> Run:
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.dir / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{self.dir}: another solon process is working on this run; wait for it") from error
        self.claim("constitution.yaml", to_yaml(self.constitution))
        self.claim("recipe.yaml", dump_recipe(self.recipe))
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def claim(self, name: str, text: str) -> None:
        """Write what the run is made of, or check that it is still the same."""
        path = self.dir / name
        if not path.is_file():
            _write(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{path}: this run was started with another {path.stem}{self._difference(path)}; "
                "give --out a new directory, or the old one back its file"
            )

    def _difference(self, path: Path) -> str:
        if path.name != "recipe.yaml":
            return ""
        old, new = load_recipe(str(path)).model_dump(mode="json"), self.recipe.model_dump(mode="json")
        changed = [f"{key}: {a} → {b}" for key, a, b in _changes(old, new)]
        return f" ({'; '.join(changed[:3])})" if changed else ""

    def path(self, stage: str, name: str = "records.jsonl") -> Path:
        return self.dir / stage / name

    def model(self, name: str) -> Path:
        return self.dir / "models" / name

    def state(self, stage: str) -> dict[str, Any]:
        path = self.path(stage, "stage.json")
        return json.loads(path.read_text()) if path.is_file() else {}

    def records(
        self,
        stage: str,
        items: Sequence[Any],
        make: Callable[[Sequence[Any]], Iterable[R]],
        kind: type[R],
        *,
        engines: Sequence[Engine] = (),
        what: str = "records",
        left_out: Mapping[str, int] | None = None,
    ) -> list[R]:
        """A stage that turns items into records of the same ids, batch by batch, each journalled as it comes.

        left_out: by reason, how many were not even made items of; it is told with the stage's result.
        The batches are the same however often the run was killed: one that is not whole is made again as a whole
        and what the journal has is not written twice. So a resumed run ends with the records of an unkilled one.
        """
        state = self.state(stage)
        size = self.recipe.batch_size
        with (
            Journal(self.path(stage)) as journal,
            progress_line(self.console, stage, len(items), what) as advance,
        ):
            advance(sum(item.id in journal.ids for item in items), {})
            for start in range(0, len(items), size):
                batch = items[start : start + size]
                if state.get("done") or all(item.id in journal.ids for item in batch):
                    continue
                before, began = _usage(engines), time.monotonic()
                for record in make(batch):
                    if journal.append(record.to_json()):
                        advance(1, {})
                state = self._add(stage, state, time.monotonic() - began, before, engines)
                state["records"] = len(journal.records)
            order = {item.id: n for n, item in enumerate(items)}
            found = sorted((r for r in journal.records if r["id"] in order), key=lambda r: order[r["id"]])
        if not state.get("done"):
            if not state:  # no item, so no batch: nothing was used, which is known
                state = self._add(stage, state, 0.0, Usage(), ())
            state |= {
                "records": len(found),
                "missing": len(items) - len(found),
                "left_out": dict(left_out or {}),
                "done": len(found) == len(items),
            }
            self._keep(stage, state)
        self.ledger.append({"name": stage, **state})
        return [kind.model_validate(r) for r in found]

    def once(
        self,
        stage: str,
        work: Callable[[Progress], dict[str, Any]],
        *,
        engines: Sequence[Engine] = (),
        total: int = 1,
        what: str = "steps",
    ) -> dict[str, Any]:
        """A stage that is done as a whole or not at all, such as training. Returns what `work` returned."""
        state = self.state(stage)
        if not state.get("done"):
            before, began = _usage(engines), time.monotonic()
            with training_line(self.console, stage, total, what) as step:
                result = work(step)
            state = self._add(stage, state, time.monotonic() - began, before, engines)
            usage = result.pop("usage", None)
            state |= {
                "done": True,
                "records": result.get("examples", result.get("comparisons", 0)),
                "result": result,
            }
            state["trained_tokens"] = result.get("tokens", 0)
            if usage:
                state["prompt_tokens"] += usage[0]
                state["completion_tokens"] += usage[1]
            self._keep(stage, state)
        self.ledger.append({"name": stage, **state})
        return state["result"]

    def _add(
        self, stage: str, state: dict[str, Any], seconds: float, before: Usage, engines: Sequence[Engine]
    ) -> dict[str, Any]:
        """The stage's state with what was used since `before`. A cost that was once unknown stays unknown."""
        after = _usage(engines)
        known = state.get("cost_usd", 0.0)
        if known is None or after.cost_usd is None or before.cost_usd is None:
            cost = None
        else:
            cost = round(known + after.cost_usd - before.cost_usd, 6)
        paid = [e for e in engines if is_remote(e.name) and e.usage.requests]
        state = {
            "done": False,
            "records": 0,
            "trained_tokens": 0,
            **state,
            "seconds": round(state.get("seconds", 0.0) + seconds, 3),
            "requests": state.get("requests", 0) + after.requests - before.requests,
            "prompt_tokens": state.get("prompt_tokens", 0) + after.prompt_tokens - before.prompt_tokens,
            "completion_tokens": state.get("completion_tokens", 0) + after.completion_tokens - before.completion_tokens,
            "peak_memory_mb": max(state.get("peak_memory_mb", 0), peak_memory_mb()),
            "peak_gpu_memory_mb": max(state.get("peak_gpu_memory_mb", 0), peak_gpu_memory_mb()),
            "cost_usd": cost,
            "endpoints": sorted({*state.get("endpoints", []), *(model_of(e.name) for e in paid)}),
            "unpriced": sorted(
                {*state.get("unpriced", []), *(model_of(e.name) for e in paid if e.usage.cost_usd is None)}
            ),
            "versions": versions(),
        }
        self._keep(stage, state)
        give_memory_back()
        return state

    def _keep(self, stage: str, state: dict[str, Any]) -> None:
        path = self.path(stage, "stage.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(state, indent=1, ensure_ascii=False) + "\n")


def peak_memory_mb() -> int:
    """The most memory that this process has held so far, MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // (1024 * 1024 if sys.platform == "darwin" else 1024)


def peak_gpu_memory_mb() -> int:
    """The most memory that this process's tensors have held on one GPU so far, MiB; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) // 2**20


def versions() -> dict[str, str]:
    found = {"solon": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def model_of(spec: str) -> str:
    """The model's name in what `--model` takes: `server:gpt-5@https://…` is gpt-5."""
    return spec.partition(":")[2].rpartition("@")[0] or spec if is_remote(spec) else spec


def _usage(engines: Sequence[Engine]) -> Usage:
    total = Usage()
    for engine in {id(e): e for e in engines}.values():
        u = engine.usage
        total.add(u.requests, u.prompt_tokens, u.completion_tokens, u.cost_usd)
    return total


def _write(path: Path, text: str) -> None:
    """Write aside, sync, rename: a file is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _changes(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new
