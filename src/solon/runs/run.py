"""The run directory: what wraps files, resume, progress and cost around every stage, the same way for each.

DIR/recipe.yaml and DIR/constitution.yaml as resolved; DIR/<stage>/records.jsonl, the journal; DIR/<stage>/stage.json,
counts, tokens, seconds, cost and versions; DIR/<stage>/usage.jsonl, what engines reported, as they reported it;
DIR/models/<name>, complete models; DIR/report.{md,html}. DIR/solon.json marks the directory as Solon's.

A stage that says "done" is counted: records or a model that are gone are made again, and said.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from solon import __version__
from solon.constitution import Constitution, load_constitution, to_yaml
from solon.engines import Book, LazyEngine, is_remote, model_name
from solon.engines.base import Engine, Failure, Usage
from solon.engines.identity import of_model
from solon.errors import InputError, Outage, printable
from solon.identity import of_input
from solon.models.paths import take_recorded_paths
from solon.publishing import MARK, Identity, differences, mark_of, recover_all, write_whole
from solon.publishing.content import of_directory
from solon.records import Pair, Record
from solon.runs.artifacts import Artifact
from solon.runs.common import Common, dump_recipe, read_recipe
from solon.runs.journal import Journal, Tally, as_record, read_journal
from solon.runs.progress import progress_line, training_line
from solon.runs.provenance import provenance
from solon.runs.trackers import tracked, trackers
from solon.settings import Settings
from solon.terminal import Console
from solon.training.saving import give_memory_back
from solon.training.settings import Log, Progress

R = TypeVar("R", bound=Record)
T = TypeVar("T")
LEDGER = {"done", "records", "seconds", "requests", "prompt_tokens", "completion_tokens"}  # what every stage.json has
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


class Run:
    """One run directory, open for work. Use as a context manager: two processes cannot work on the same one."""

    def __init__(self, recipe: Common, out: Path, *, quiet: bool = False) -> None:
        self._artifacts: dict[Artifact[Any], Any] = {}
        self.recipe, self.dir = recipe, out
        self.constitution: Constitution = load_constitution(recipe.constitution)
        self.console = Console(stderr=True, quiet=quiet)
        self.ledger: list[dict[str, Any]] = []
        self._failures: dict[str, Failure] = {}

    def __enter__(self) -> Run:
        check_run_directory(self.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.dir / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"{self.dir}: another solon process is working on this run; wait for it") from error
        if mark_of(self.dir / MARK) is None:
            write_whole(self.dir / MARK, json.dumps({"solon": __version__, "files": []}) + "\n")
        recover_all(self.dir / "models")
        self.claim("constitution.yaml", to_yaml(self.constitution))
        self.claim("recipe.yaml", dump_recipe(self.recipe))
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def say(self, text: str) -> None:
        """Tell the person one line."""
        self.console.print(f"solon: {text}", markup=False, highlight=False, soft_wrap=True)

    # --- what stages give each other ---

    def put(self, artifact: Artifact[T], value: T) -> None:
        self._artifacts[artifact] = value

    def find(self, *artifacts: Artifact[T]) -> T | None:
        """The first of these that this run has; None where it has none of them."""
        return next((self._artifacts[a] for a in artifacts if a in self._artifacts), None)

    def get(self, *artifacts: Artifact[T]) -> T:
        """The first of these that this run has."""
        found = self.find(*artifacts)
        if found is None:
            raise LookupError(
                f"the run has no {' and no '.join(a.name for a in artifacts)}: needs or uses leaves it out"
            )
        return found

    def engine(self, spec: str) -> LazyEngine:
        """The engine behind what `--model` takes, opened when it is first asked."""
        return LazyEngine(spec, system=self.recipe.system, dtype=self.recipe.dtype)

    def meta(self, engine: Engine, **more: Any) -> dict[str, Any]:
        """What stands in each record's `meta`."""
        return provenance(self.constitution, engine, self.recipe.seed, **more)

    # --- what the run is made of ---

    def claim(self, name: str, text: str) -> None:
        """Write what the run is made of, or check that it is still the same."""
        path = self.dir / name
        if not path.is_file():
            write_whole(path, text)
        elif path.read_bytes() != text.encode("utf-8") and not self._same_recipe(path):
            raise InputError(
                f"{path}: this run was started with another {path.stem}{self._difference(path, text)}; "
                "give --out a new directory, or the old one back its file"
            )

    def _same_recipe(self, path: Path) -> bool:
        """Whether a recipe.yaml that an older Solon wrote, with fewer or other keys, says the same."""
        return path.name == "recipe.yaml" and self._recipe_in(path) == self.recipe

    def _recipe_in(self, path: Path) -> Common:
        return read_recipe(type(self.recipe), path.read_bytes(), str(path))

    def _difference(self, path: Path, text: str) -> str:
        if path.name == "recipe.yaml":
            old, new = self._recipe_in(path).model_dump(mode="json"), self.recipe.model_dump(mode="json")
        elif path.suffix == ".json" and (known := read_object(path)) is not None:
            old, new = known, json.loads(text)
        else:
            return ""
        changed = [f"{key}: {_short(a)} → {_short(b)}" for key, a, b in differences(old, new)]
        return f" ({'; '.join(changed[:3])})" if changed else ""

    def path(self, stage: str, name: str = "records.jsonl") -> Path:
        return self.dir / stage / name

    @contextmanager
    def journal(self, stage: str) -> Iterator[Callable[[dict[str, Any]], Any]]:
        with Journal(self.path(stage), keep=False) as journal:
            yield journal.append

    def journalled(self, stage: str) -> list[dict[str, Any]]:
        return [record for _, record in read_journal(self.path(stage))]

    @contextmanager
    def log(self, stage: str, config: Mapping[str, Any]) -> Iterator[Log]:
        with trackers(self.dir / "tensorboard", stage, self.recipe.report_to, config) as log:
            yield log

    @contextmanager
    def tracked(self, stage: str, step: Progress, settings: Settings) -> Iterator[Progress]:
        config = settings.model_dump(mode="json")
        with tracked(step, self.dir / "tensorboard", stage, self.recipe.report_to, config) as both:
            yield both

    def model(self, name: str) -> Path:
        return self.dir / "models" / name

    def state(self, stage: str) -> dict[str, Any]:
        """What stage.json says; empty before the stage began. Raises InputError where the file is damaged."""
        path = self.path(stage, "stage.json")
        if not path.is_file():
            return {}
        found = read_object(path)
        if found is None or not found.keys() >= LEDGER or (found["done"] and "records" not in found):
            raise InputError(
                f"{path}: is damaged; remove this file to go on with the stage's records, or the folder {stage} to make "
                "the stage again"
            )
        return found

    def fail(self, failure: Failure) -> None:
        """Note, of the stage under way, why nothing was made of an item."""
        self._failures[failure.id] = failure

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
        made_from: Identity | None = None,
    ) -> list[R]:
        """A stage that turns items into records of the same ids, batch by batch, each journalled as it comes.

        left_out: by reason, how many were not even made items of; it is told with the stage's result. made_from: what
        the records are made from beside the items and the engines' models, as `once` takes it.
        The batches are the same however often the run was killed: one that is not whole is made again as a whole
        and what the journal has is not written twice. So a resumed run ends with the records of an unkilled one: what a
        model in this process says depends, by rounding, on what shares its batch. A server is asked for what is missing
        alone.

        What `make` told of by `fail` has no record. It is counted, and left out for good, unless it may pass: then the
        run ends with an Outage, and the next start asks once more.
        """
        opened = [e.name for e in engines if isinstance(e, LazyEngine)]
        models = {f"model {n}" if n > 1 else "model": of_model(spec) for n, spec in enumerate(opened, 1)}
        made_from, path = {**models, **(made_from or {})}, self.path(stage)
        state = self.take_up(stage, made_from)
        contents = {item.id: of_input(item) for item in items}
        if (place := self._of_another_text(path, contents)) is not None:
            self._set_aside(stage, f"{place} was made of another text than the stage before has now")
            state = self.take_up(stage, made_from)
        there = {row["id"] for _, row in read_journal(path)} & contents.keys()
        given_up: dict[str, str] = dict(state.get("failed", {}))
        if state.get("done") and (gone := contents.keys() - there - given_up.keys()):
            self.say(f"{stage}: {len(gone)} of {len(items)} {what} are gone from {path}; they are made again")
            state["done"] = False
        failed_before, self._failures = set(state.get("again", [])), {}
        size, served = self.recipe.batch_size, all_remote(engines)
        with (
            Journal(path, keep=False) as journal,
            self._booked(stage, state, engines) as used,
            progress_line(self.console, stage, len(items), what) as advance,
        ):
            advance(len(there), {})
            for start in range(0, len(items), size):
                batch = items[start : start + size]
                missing = [item for item in batch if item.id not in journal.ids and item.id not in given_up]
                if not missing:
                    continue
                if served:
                    batch = missing
                began = time.monotonic()
                for record in make(batch):
                    if "meta" in kind.model_fields:
                        meta = {**record.meta, "input": contents[record.id]}  # type: ignore[attr-defined]
                        record = record.model_copy(update={"meta": meta})
                    if journal.append(record.to_json()):
                        advance(1, {})
                given_up |= {f.id: f.reason for f in self._failures.values() if not f.again or f.id in failed_before}
                state["records"] = len(journal.ids & contents.keys())
                self._add(stage, state, time.monotonic() - began, used, engines)
        by_id = {item.id: item for item in items}
        rows = [(place, _with_order(row, by_id.get(row["id"]))) for place, row in read_journal(path)]
        made = {row["id"]: as_record(place, row, kind) for place, row in rows}
        found = [made[item.id] for item in items if item.id in made]
        if not state.get("done"):
            state["left_out"] = dict(left_out or {})
            if LEDGER - state.keys():  # no item, so no batch; or stage.json was removed
                self._add(stage, state, 0.0, used, ())
            self._settle(stage, state, contents, {item.id for item in items if item.id in made}, given_up, what)
        self.ledger.append({"name": stage, **state})
        return found

    def _of_another_text(self, path: Path, contents: Mapping[str, str]) -> str | None:
        """The place of the first record of a journal whose item has another text now; None where there is none."""
        for place, row in read_journal(path):
            made_of = row["meta"].get("input") if isinstance(row.get("meta"), dict) else None
            known = contents.get(row["id"], made_of)
            if made_of not in (None, known):  # None: by an older Solon
                return place
        return None

    def _settle(
        self,
        stage: str,
        state: dict[str, Any],
        contents: Mapping[str, str],
        made: set[str],
        given_up: dict[str, str],
        what: str,
    ) -> None:
        """Say in the stage's state what became of every item. Raises Outage where some may still come."""
        given_up = {i: reason for i, reason in given_up.items() if i not in made}
        again = [f for f in self._failures.values() if f.id not in made | given_up.keys()]
        unexplained = contents.keys() - made - given_up.keys() - {f.id for f in again}
        given_up |= dict.fromkeys(sorted(unexplained), "no reason was told")
        state |= {
            "records": len(made),
            "missing": len(contents) - len(made),
            "reasons": dict(Counter(given_up.values()).most_common()),
            "failed": given_up,
            "again": [f.id for f in again],
            "done": not again,
        }
        self._keep(stage, state)
        if again:
            raise Outage(
                f"{self.dir}: {len(again)} of {len(contents)} {what} of the stage {stage} are missing, since the model was "
                f"out of reach ({again[0].reason})"
            )
        if given_up:
            told = "; ".join(f"{printable(reason, 120)} ({n})" for reason, n in list(state["reasons"].items())[:3])
            self.say(f"{stage}: {len(given_up)} of {len(contents)} {what} left out: {told}")

    def once(
        self,
        stage: str,
        work: Callable[[Progress], dict[str, Any]],
        *,
        engines: Sequence[Engine] = (),
        total: int = 1,
        what: str = "steps",
        makes: Path | None = None,
        made_from: Identity,
    ) -> dict[str, Any]:
        """A stage that is done as a whole or not at all, such as training. Returns what `work` returned.

        makes: the model that it writes. One that is gone is made again; one whose content changed is an InputError.
        made_from: what the stage is made from, each part with its `name` and `fingerprint`. Where a part is not the one
        it was made from before, what stands there is set aside and the stage is made again.
        """
        state = self.take_up(stage, made_from)
        if state.get("done") and not isinstance(state.get("result"), dict):
            raise InputError(f"{self.path(stage, 'stage.json')}: is damaged; remove it to make the stage again")
        if makes is not None:
            self._check_model(stage, state, makes)
        if not state.get("done"):
            began = time.monotonic()
            line = training_line(self.console, stage, total, what)
            with self._booked(stage, state, engines) as used, line as step:
                result = work(step)
            give_memory_back()
            usage = result.pop("usage", None)
            self._add(stage, state, time.monotonic() - began, used, engines)
            state |= {
                "records": result.get("examples", result.get("comparisons", 0)),
                "result": result,
                "trained_tokens": result.get("tokens", 0),
                "done": True,
            }
            if usage:
                state["prompt_tokens"] += usage[0]
                state["completion_tokens"] += usage[1]
            if makes is not None:
                self._note_model(stage, state, makes)
            self._keep(stage, state)
        self.ledger.append({"name": stage, **state})
        return state["result"]

    def reopen(self, stage: str, why: str) -> None:
        """Let a stage that was done be made again, and say why."""
        state = self.state(stage)
        self.say(f"{stage}: {why}; the stage is made again")
        if state:
            self._keep(stage, state | {"done": False})

    def _check_model(self, stage: str, state: dict[str, Any], model: Path) -> None:
        if not state.get("done"):
            return
        if not (model / "config.json").is_file():
            self.say(f"{stage}: its model {model} is gone; the stage is made again")
            state["done"] = False
        elif state.get("model", of_directory(model)) != of_directory(model):
            raise InputError(
                f"{model}: is not the model that the stage {stage} wrote; give it its files back, or remove the folder "
                f"{model} to make it again"
            )

    def _note_model(self, stage: str, state: dict[str, Any], model: Path) -> None:
        made = of_directory(model)
        if state.get("model", made) != made:
            self.say(f"{stage}: the model that was made again is not the first to the last digit")
        state["model"] = made

    def take_up(self, stage: str, made_from: Identity) -> dict[str, Any]:
        """The stage's state, to go on with. A stage that was made from something else is set aside: it is empty then.

        What it is made from is written down before any work, so that a kill at any instant leaves it known.
        """
        path = self.path(stage, "made_from.json")
        before = read_object(path) if path.is_file() else None  # an older Solon wrote none
        changed = [f"{key}: {_short(a)} → {_short(b)}" for key, a, b in differences(before or made_from, made_from)]
        if changed:
            self._set_aside(stage, f"it was made from another {'; '.join(changed)}")
        if changed or before is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(dict(made_from), indent=1, ensure_ascii=False) + "\n")
        return self.state(stage)

    def _set_aside(self, stage: str, why: str) -> None:
        """Keep what a stage made under another name, so that the stage is made again. What it cost stays in the ledger."""
        places = (self.dir / f"{stage}.earlier-{n}" for n in itertools.count(1))
        aside = next(place for place in places if not place.exists())
        os.rename(self.dir / stage, aside)
        (self.dir / stage).mkdir()
        if (tally := aside / "usage.jsonl").is_file():
            shutil.copy2(tally, self.path(stage, "usage.jsonl"))
        self.say(f"{stage}: {why}; what stands there is kept as {aside.name}, and the stage is made again")

    @contextmanager
    def _booked(self, stage: str, state: dict[str, Any], engines: Sequence[Engine]) -> Iterator[Usage]:
        """Inside, all that the engines report is written down as they report it. Yields the usage of all starts."""
        path = self.path(stage, "usage.jsonl")
        fresh, tally = not path.is_file(), Tally(path)
        if fresh and state.get("requests"):  # a stage begun by a Solon that kept no tally
            tally.add(state["requests"], state["prompt_tokens"], state["completion_tokens"], state.get("cost_usd", 0.0))
        try:
            for engine in engines:
                _book(engine, tally.add)
            yield tally.used
        finally:
            for engine in engines:
                _book(engine, None)
            tally.close()

    def _add(self, stage: str, state: dict[str, Any], seconds: float, used: Usage, engines: Sequence[Engine]) -> None:
        """Bring the stage's state up to date and keep it. used: what engines used in all starts."""
        paid = [e for e in engines if is_remote(e.name) and e.usage.requests]
        unpriced = [e for e in paid if e.usage.cost_usd is None]
        state |= {
            "done": False,
            "records": state.get("records", 0),
            "trained_tokens": state.get("trained_tokens", 0),
            "seconds": round(state.get("seconds", 0.0) + seconds, 3),
            "requests": used.requests,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "peak_memory_mb": max(state.get("peak_memory_mb", 0), peak_memory_mb()),
            "peak_gpu_memory_mb": max(state.get("peak_gpu_memory_mb", 0), peak_gpu_memory_mb()),
            "cost_usd": None if used.cost_usd is None else round(used.cost_usd, 6),
            "endpoints": sorted({*state.get("endpoints", []), *(model_name(e.name) for e in paid)}),
            "unpriced": sorted({*state.get("unpriced", []), *(model_name(e.name) for e in unpriced)}),
            "versions": versions(),
            "ways": {**state.get("ways", {}), **take_recorded_paths()},  # through which models, in words
        }
        self._keep(stage, state)
        give_memory_back(cycles=False)

    def _keep(self, stage: str, state: dict[str, Any]) -> None:
        path = self.path(stage, "stage.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(state, indent=1, ensure_ascii=False) + "\n")


def check_run_directory(out: Path) -> None:
    """Raises InputError unless a run may be made or resumed there: absent, empty, or a run's directory."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise InputError(f"--out {out}: is a file; give the name of a new directory")
    names = {p.name for p in out.iterdir()} - {".lock"}
    if names and mark_of(out / MARK) is None and not names >= {"recipe.yaml", "constitution.yaml"}:
        raise InputError(
            f"--out {out}: holds files and is no run of Solon's ({', '.join(sorted(names)[:3])}); nothing was changed. Give "
            "a new or empty directory"
        )


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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


@functools.cache
def versions() -> Mapping[str, str]:
    found = {"solon": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def all_remote(engines: Sequence[Engine]) -> bool:
    """Whether there are engines, and none of them is in this process."""
    return bool(engines) and all(is_remote(e.name) for e in engines)


def _book(engine: Engine, where: Book | None) -> None:
    if isinstance(engine, LazyEngine):
        engine.book(where)
    else:
        engine.usage.book = where


def _with_order(row: dict[str, Any], item: Any) -> dict[str, Any]:
    """A comparison that Solon wrote before 27 November 2026 does not say which response was the pair's first."""
    if "chosen" not in row or "first" in row or not isinstance(item, Pair):
        return row
    return {**row, "first": "chosen" if row["chosen"][-1]["content"] == item.responses[0] else "rejected"}


def _short(value: Any) -> str:
    return printable(str(value), 16 if isinstance(value, str) and len(value) == 64 else 80)
