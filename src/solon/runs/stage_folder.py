"""One stage's folder in a run directory: the stage's state, the parts it was made from, and the usage of its engines."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from solon.engines import Book, Engine, Failure, LazyEngine, Usage, is_remote, model_name
from solon.errors import InputError, Outage, printable
from solon.models.paths import take_recorded_paths
from solon.publishing import Identity, differences, write_whole
from solon.publishing.content import of_directory
from solon.runs.journal import Tally, read_journal
from solon.runs.machine import peak_gpu_memory_mb, peak_memory_mb, versions
from solon.training.saving import give_memory_back

# The keys that every stage.json has.
STATE_KEYS = {"done", "records", "seconds", "requests", "prompt_tokens", "completion_tokens"}


class StageFolder:
    """DIR/STAGE of a run: records.jsonl, stage.json (the state), made_from.json and usage.jsonl.

    The state is a dict. `take_up` reads it, the stage changes it, and `save` writes it. say: prints one line for the user.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.stage, self.say = folder, folder.name, say

    def path(self, name: str) -> Path:
        return self.folder / name

    def state(self) -> dict[str, Any]:
        """The content of stage.json; empty before the stage began. Raises InputError where the file is damaged."""
        path = self.path("stage.json")
        if not path.is_file():
            return {}
        state = read_object(path)
        if state is None or not state.keys() >= STATE_KEYS:
            raise InputError(
                f"{path}: is damaged; remove this file to go on with the stage's records, or the folder {self.stage} to "
                "make the stage again"
            )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        self._write("stage.json", state)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path(name), json.dumps(dict(value), indent=1, ensure_ascii=False) + "\n")

    def take_up(self, made_from: Identity, contents: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The state of the stage, to continue from.

        made_from: the parts that the stage is made from, each with its `name` and `fingerprint`. contents: by id, the fingerprint
        of each item. Where a part or an item differs from the one before, the folder is kept as STAGE.earlier-N and the state is
        empty. The parts are written down before any work, so that a kill at any instant leaves them known.
        """
        path = self.path("made_from.json")
        before = read_object(path) if path.is_file() else None  # an older Solon wrote no such file
        changes = [f"{key}: {short(a)} → {short(b)}" for key, a, b in differences(before or made_from, made_from)]
        if changes:
            self._set_aside(f"it was made from another {'; '.join(changes)}")
        elif place := self._changed_record(contents or {}):
            self._set_aside(f"{place} was made of another text than the stage before has now")
            before = None
        if changes or before is None:
            self._write("made_from.json", made_from)
        return self.state()

    def _changed_record(self, contents: Mapping[str, str]) -> str | None:
        """The place of the first journalled record whose item has another content now; None where there is none."""
        for place, row in read_journal(self.path("records.jsonl")):
            before = row["meta"].get("input") if isinstance(row.get("meta"), dict) else None
            if before not in (None, contents.get(row["id"], before)):  # None: an older Solon wrote the record
                return place
        return None

    def _set_aside(self, why: str) -> None:
        """Rename the folder, so that the stage is made again. The stage's cost so far stays in the ledger."""
        names = (self.folder.with_name(f"{self.stage}.earlier-{n}") for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        os.rename(self.folder, aside)
        self.folder.mkdir()
        if (usage := aside / "usage.jsonl").is_file():
            shutil.copy2(usage, self.path("usage.jsonl"))
        self.say(f"{self.stage}: {why}; what stands there is kept as {aside.name}, and the stage is made again")

    def reopen(self, why: str) -> None:
        """Let a finished stage be made again, and say why."""
        self.say(f"{self.stage}: {why}; the stage is made again")
        if state := self.state():
            self.save(state | {"done": False})

    def check_model(self, state: dict[str, Any], model: Path) -> None:
        """Reopen a finished stage whose model is gone. Raises InputError where the model's content changed."""
        if not state.get("done"):
            return
        if not (model / "config.json").is_file():
            self.say(f"{self.stage}: its model {model} is gone; the stage is made again")
            state["done"] = False
        elif state.get("model", of_directory(model)) != of_directory(model):
            raise InputError(
                f"{model}: is not the model that the stage {self.stage} wrote; give it its files back, or remove the folder "
                f"{model} to make it again"
            )

    def note_model(self, state: dict[str, Any], model: Path) -> None:
        """Put the fingerprint of the stage's model into the state. Say where a model that was made again differs from the first."""
        fingerprint = of_directory(model)
        if state.get("model", fingerprint) != fingerprint:
            self.say(f"{self.stage}: the model that was made again is not the first to the last digit")
        state["model"] = fingerprint

    @contextmanager
    def metered(self, state: Mapping[str, Any], engines: Sequence[Engine]) -> Iterator[Usage]:
        """Inside this context, each report of usage by the engines is written down at once. Yields the usage of all starts."""
        path = self.path("usage.jsonl")
        fresh, tally = not path.is_file(), Tally(path)
        if fresh and state.get("requests"):  # an older Solon began the stage and kept no tally
            tally.add(state["requests"], state["prompt_tokens"], state["completion_tokens"], state.get("cost_usd", 0.0))
        try:
            for engine in engines:
                _report_to(engine, tally.add)
            yield tally.used
        finally:
            for engine in engines:
                _report_to(engine, None)
            tally.close()

    def add_work(self, state: dict[str, Any], seconds: float, used: Usage, engines: Sequence[Engine]) -> None:
        """Add a piece of work to the state and save it. seconds: of this piece. used: the engines' usage in all starts."""
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
            "ways": {**state.get("ways", {}), **take_recorded_paths()},  # in words, the forward pass of each model
        }
        self.save(state)
        give_memory_back(cycles=False)

    def settle(
        self, state: dict[str, Any], ids: Collection[str], made: Collection[str], given_up: Mapping[str, str],
        failures: Collection[Failure], noun: str,
    ) -> None:  # fmt: skip
        """Write the outcome of every item into the state: made, given up for good (by id, the reason), or to be asked again.

        failures: of this start. Raises Outage where an item is to be asked again: the model was out of reach.
        """
        given_up = {name: reason for name, reason in given_up.items() if name not in made}
        again = [f for f in failures if f.id not in made and f.id not in given_up]
        unexplained = {*ids} - {*made} - given_up.keys() - {f.id for f in again}
        given_up |= dict.fromkeys(sorted(unexplained), "no reason was told")
        state |= {
            "records": len(made),
            "missing": len(ids) - len(made),
            "reasons": dict(Counter(given_up.values()).most_common()),
            "failed": given_up,
            "again": [f.id for f in again],
            "done": not again,
        }
        self.save(state)
        if again:
            raise Outage(
                f"{self.folder.parent}: {len(again)} of {len(ids)} {noun} of the stage {self.stage} are missing, since the "
                f"model was out of reach ({again[0].reason})"
            )
        if given_up:
            reasons = "; ".join(f"{printable(reason, 120)} ({n})" for reason, n in list(state["reasons"].items())[:3])
            self.say(f"{self.stage}: {len(given_up)} of {len(ids)} {noun} left out: {reasons}")


def _report_to(engine: Engine, book: Book | None) -> None:
    if isinstance(engine, LazyEngine):
        engine.book(book)
    else:
        engine.usage.book = book


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where the file holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def short(value: Any) -> str:
    """A value on one short line; of a SHA-256 the first characters."""
    return printable(str(value), 16 if isinstance(value, str) and len(value) == 64 else 80)
