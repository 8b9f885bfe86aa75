"""The run directory: it adds files, resume, progress and cost to every stage, the same way for each.

DIR/recipe.yaml and DIR/constitution.yaml as resolved. DIR/STAGE: the stage's journal (records.jsonl), its counts, tokens, seconds,
cost and versions (stage.json), the parts it was made from (made_from.json) and the usage of its engines (usage.jsonl).
DIR/models/NAME: complete models. DIR/report.{md,html}. The mark DIR/solon.json makes the directory Solon's.

A finished stage is counted at each start: records or a model that are gone are made again, and Solon says so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from solon import __version__
from solon.constitution import Constitution, load_constitution, to_yaml
from solon.engines import Engine, Failure, LazyEngine, is_remote
from solon.engines.identity import of_model
from solon.errors import InputError
from solon.identity import of_input
from solon.publishing import MARK, Identity, differences, mark_of, recover_all, write_whole
from solon.records import Pair, Record
from solon.runs import Artifact
from solon.runs.common import Common, dump_recipe, read_recipe
from solon.runs.journal import NOT_A_RECORD, Journal, as_record, batches, provenance, read_journal, with_input
from solon.runs.progress import progress_line, training_line
from solon.runs.stage_folder import STATE_KEYS, StageFolder, read_object, short
from solon.runs.trackers import tracked, trackers
from solon.settings import Settings
from solon.terminal import Console
from solon.training.saving import give_memory_back
from solon.training.settings import Log, Progress

R = TypeVar("R", bound=Record)
T = TypeVar("T")


class Run:
    """One run directory, open for work. Use as a context manager: two processes cannot work on the same directory."""

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
        """Print one line for the user on stderr."""
        self.console.print(f"solon: {text}", markup=False, highlight=False, soft_wrap=True)

    def put(self, artifact: Artifact[T], value: T) -> None:
        """Give the value of an artifact to the stages that follow."""
        self._artifacts[artifact] = value

    def find(self, *artifacts: Artifact[T]) -> T | None:
        """The first of these artifacts that this run has; None where it has none of them."""
        return next((self._artifacts[a] for a in artifacts if a in self._artifacts), None)

    def get(self, *artifacts: Artifact[T]) -> T:
        """The first of these artifacts that this run has. Raises LookupError where it has none of them."""
        value = self.find(*artifacts)
        if value is None:
            names = " and no ".join(a.name for a in artifacts)
            raise LookupError(f"the run has no {names}: needs or uses leaves it out")
        return value

    def engine(self, spec: str) -> LazyEngine:
        """The engine of a model, named as for `--model`. It is opened at its first request."""
        return LazyEngine(spec, system=self.recipe.system, dtype=self.recipe.dtype)

    def meta(self, engine: Engine, **more: Any) -> dict[str, Any]:
        """The `meta` of each record that this engine makes."""
        return provenance(self.constitution, engine, self.recipe.seed, **more)

    def claim(self, name: str, text: str) -> None:
        """Write a file that says what the run is made of, or check that it still says the same."""
        path = self.dir / name
        if not path.is_file():
            write_whole(path, text)
        if path.read_bytes() == text.encode("utf-8"):
            return
        old, new = read_object(path), {}
        if name == "recipe.yaml":
            recipe = read_recipe(type(self.recipe), path.read_bytes(), str(path))
            if recipe == self.recipe:  # an older Solon wrote the same recipe with fewer or other keys
                return
            old, new = recipe.model_dump(mode="json"), self.recipe.model_dump(mode="json")
        elif old is not None:
            new = json.loads(text)
        changes = [f"{key}: {short(a)} → {short(b)}" for key, a, b in differences(old, new)] if old else []
        shown = f" ({'; '.join(changes[:3])})" if changes else ""
        raise InputError(
            f"{path}: this run was started with another {path.stem}{shown}; "
            "give --out a new directory, or the old one back its file"
        )

    def folder(self, stage: str) -> StageFolder:
        return StageFolder(self.dir / stage, self.say)

    def path(self, stage: str, name: str = "records.jsonl") -> Path:
        return self.dir / stage / name

    def state(self, stage: str) -> dict[str, Any]:
        """The content of a stage's stage.json; empty before the stage began."""
        return self.folder(stage).state()

    def model(self, name: str) -> Path:
        """The directory of a model that this run writes."""
        return self.dir / "models" / name

    @contextmanager
    def journal(self, stage: str) -> Iterator[Callable[[dict[str, Any]], bool]]:
        with Journal(self.path(stage)) as journal:
            yield journal.append

    def journalled(self, stage: str) -> list[dict[str, Any]]:
        return [record for _, record in read_journal(self.path(stage))]

    def log(self, stage: str, config: Mapping[str, Any]) -> AbstractContextManager[Log]:
        return trackers(self.dir / "tensorboard", stage, self.recipe.report_to, config)

    def tracked(self, stage: str, step: Progress, settings: Settings) -> AbstractContextManager[Progress]:
        config = settings.model_dump(mode="json")
        return tracked(step, self.dir / "tensorboard", stage, self.recipe.report_to, config)

    def fail(self, failure: Failure) -> None:
        """Note why the stage under way made no record of an item."""
        self._failures[failure.id] = failure

    def records(
        self, stage: str, items: Sequence[Any], make: Callable[[Sequence[Any]], Iterable[R]], kind: type[R], *,
        engines: Sequence[Engine] = (), noun: str = "records", left_out: Mapping[str, int] | None = None,
        made_from: Identity | None = None,
    ) -> list[R]:  # fmt: skip
        """Turn items into records of the same ids, batch by batch, and journal each record at once. Returns them in order.

        noun: the word for the records in messages. left_out: by reason, how many candidates did not become items. made_from: the
        parts that the records are made from beside the items and the engines' models, as `once` takes them.
        `make` calls `fail` for an item of which it makes no record. The item is left out for good and counted, unless the failure
        may pass: then the run ends with an Outage, and the next start asks once more.
        """
        folder, contents = self.folder(stage), {item.id: of_input(item) for item in items}
        specs = [e.name for e in engines if isinstance(e, LazyEngine)]
        models = {f"model {n}" if n > 1 else "model": of_model(spec) for n, spec in enumerate(specs, 1)}
        state, path = folder.take_up({**models, **(made_from or {})}, contents), self.path(stage)
        there = {row["id"] for _, row in read_journal(path)} & contents.keys()
        given_up: dict[str, str] = dict(state.get("failed", {}))
        if state.get("done") and (gone := contents.keys() - there - given_up.keys()):
            self.say(f"{stage}: {len(gone)} of {len(items)} {noun} are gone from {path}; they are made again")
            state["done"] = False
        failed_before, self._failures = set(state.get("again", [])), {}
        in_process = not engines or not all(is_remote(e.name) for e in engines)
        with (
            Journal(path) as journal,
            folder.metered(state, engines) as used,
            progress_line(self.console, stage, len(items), noun) as advance,
        ):

            def is_missing(item: Any) -> bool:
                return item.id not in journal.ids and item.id not in given_up

            advance(len(there), {})
            for batch in batches(items, self.recipe.batch_size, is_missing, whole=in_process):
                began = time.monotonic()
                for record in make(batch):
                    if journal.append(with_input(record, contents[record.id]).to_json()):  # type: ignore[attr-defined]
                        advance(1, {})
                given_up |= {f.id: f.reason for f in self._failures.values() if not f.again or f.id in failed_before}
                state["records"] = len(journal.ids & contents.keys())
                folder.add_work(state, time.monotonic() - began, used, engines)
        by_id = {item.id: item for item in items}
        rows = ((place, _with_order(row, by_id.get(row["id"]))) for place, row in read_journal(path))
        made = {row["id"]: as_record(place, row, kind) for place, row in rows}
        ids = [item.id for item in items if item.id in made]
        if not state.get("done"):
            state["left_out"] = dict(left_out or {})
            if STATE_KEYS - state.keys():  # there was no batch, or stage.json was removed
                folder.add_work(state, 0.0, used, ())
            folder.settle(state, contents, {*ids}, given_up, self._failures.values(), noun)
        self.ledger.append({"name": stage, **state})
        return [made[name] for name in ids]

    def once(
        self, stage: str, work: Callable[[Progress], dict[str, Any]], *, engines: Sequence[Engine] = (), total: int = 1,
        noun: str = "steps", makes: Path | None = None, made_from: Identity,
    ) -> dict[str, Any]:  # fmt: skip
        """A stage that is done as a whole or not at all, such as a training. Returns the dict that `work` returned.

        total, noun: the number of steps that the progress line counts, and the word for them. makes: the model that the stage
        writes. A model that is gone is made again; a model whose content changed is an InputError. made_from: the parts that the
        stage is made from, each with its `name` and `fingerprint`. Where a part changed, the stage is made again (`take_up`).
        """
        folder = self.folder(stage)
        state = folder.take_up(made_from)
        if state.get("done") and not isinstance(state.get("result"), dict):
            raise InputError(f"{self.path(stage, 'stage.json')}: is damaged; remove it to make the stage again")
        if makes is not None:
            folder.check_model(state, makes)
        if not state.get("done"):
            began = time.monotonic()
            line = training_line(self.console, stage, total, noun)
            with folder.metered(state, engines) as used, line as step:
                result = work(step)
            give_memory_back()
            prompt_tokens, completion_tokens = result.pop("usage", None) or (0, 0)
            folder.add_work(state, time.monotonic() - began, used, engines)
            state |= {
                "records": result.get("examples", result.get("comparisons", 0)),
                "result": result,
                "trained_tokens": result.get("tokens", 0),
                "done": True,
            }
            state["prompt_tokens"] += prompt_tokens
            state["completion_tokens"] += completion_tokens
            if makes is not None:
                folder.note_model(state, makes)
            folder.save(state)
        self.ledger.append({"name": stage, **state})
        finished: dict[str, Any] = state["result"]
        return finished


def check_run_directory(out: Path) -> None:
    """Raises InputError unless a run may begin or resume at `out`: the path is absent, empty or a run's directory."""
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


def _with_order(row: dict[str, Any], item: Any) -> dict[str, Any]:
    """A comparison that Solon wrote before 27 November 2026 does not say which response was the pair's first."""
    if "chosen" not in row or "first" in row or not isinstance(item, Pair):
        return row
    with suppress(*NOT_A_RECORD):  # the record's own check refuses a damaged row
        return {**row, "first": "chosen" if row["chosen"][-1]["content"] == item.responses[0] else "rejected"}
    return row
