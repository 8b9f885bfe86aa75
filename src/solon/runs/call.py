"""One call of a verb, from file to file: the same journal and progress as in a run, without the run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from solon import distributed
from solon.constitution import Constitution, load_constitution
from solon.engines import Failure, LazyEngine, OnFailure
from solon.errors import InputError, NothingAnswered, Outage, nearest, printable
from solon.identity import of_input
from solon.publishing import BEGIN_ANEW, Directory, File, Identity, directory, file
from solon.records import Record
from solon.runs.journal import Journal, as_record, batches, provenance, read_journal, with_input
from solon.runs.options import Training, Verb, make_settings
from solon.runs.progress import progress_line, training_line
from solon.settings import Settings
from solon.terminal import Console
from solon.training.settings import Log, Progress
from solon.yaml_text import assignment

R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=Settings)
BATCH = 64  # records that are worked on together


@dataclass
class Outcome:
    """How many of a verb's items have a record and an answer, and why the others have none."""

    records: int = 0  # in the file now, those of earlier starts included
    failures: dict[str, Failure] = field(default_factory=dict)  # by id, of the items without a record
    abstained: Counter[str] = field(default_factory=Counter)  # reasons of the records that hold no answer

    @property
    def reasons(self) -> dict[str, int]:
        """Why items have no answer, and how many items, the most common reason first."""
        return dict((self.abstained + Counter(f.reason for f in self.failures.values())).most_common())

    @property
    def failed(self) -> int:
        return len(self.failures) + self.abstained.total()

    def summary(self) -> dict[str, Any]:
        return {"records": self.records, "failed": self.failed, "reasons": self.reasons}

    @property
    def open(self) -> int:
        """How many items a later start may still get an answer for, because the model was out of reach."""
        return sum(f.again for f in self.failures.values())

    @property
    def nothing(self) -> bool:
        """Whether no item has an answer."""
        return self.records <= self.abstained.total()

    def line(self, out: Path, noun: str) -> str:
        """The outcome in one line for the user. noun: the word for the records."""
        if not self.failed:
            return f"{out}: {self.records} {noun}"
        shown = "; ".join(f"{printable(reason, 160)} ({n})" for reason, n in list(self.reasons.items())[:3])
        more = f"; {len(self.reasons) - 3} other reasons" if len(self.reasons) > 3 else ""
        return f"{out}: {self.records} {noun}; without an answer {self.failed}: {shown}{more}"


class Call:
    """One call of a verb: its options, and the files, resume and progress around its work."""

    def __init__(self, verb: type[Verb], given: Mapping[str, Any]) -> None:
        self.verb, self.given = verb, dict(given)
        self.seed = given.get("seed") or 0
        self.system, self.dtype, self.limit = given.get("system", ""), given.get("dtype", "auto"), given.get("limit")
        self.restart, self.quiet = given.get("restart", False), given.get("quiet", False)
        self.out = given["out"] if given.get("out") is not None else Path()
        self._set = dict(map(assignment, given.get("set_") or []))
        known = [name for kind in verb.settings for name in kind.model_fields]
        for name in self._set:
            if name not in known:
                raise InputError(f"--set {name}: no such setting of solon {verb.name}{nearest(name, known)}")

    def __getitem__(self, name: str) -> Any:
        """The value of an option."""
        return self.given[name]

    @property
    def constitution(self) -> Constitution:
        return load_constitution(self["constitution"])

    def of(self, kind: type[S], **changed: Any) -> S:
        """The settings of this kind, from the options and --set. changed: fields that the verb sets itself."""
        given = {name: value for name, value in self.given.items() if value is not None}
        return make_settings(kind, {**given, **self._set, **changed})

    def engine(self) -> LazyEngine:
        return LazyEngine(self["model"], system=self.system, dtype=self.dtype)

    def meta(self, engine: LazyEngine, **more: Any) -> dict[str, Any]:
        return provenance(self.constitution, engine, self.seed, **more)

    def file(self, inputs: Sequence[str], beside: Sequence[Path] = ()) -> AbstractContextManager[File]:
        return file(self.out, inputs, beside)

    def records(
        self, target: File, items: Callable[[], Iterable[Any]],
        make: Callable[[Sequence[Any], OnFailure], Iterable[R]], kind: type[R], *, identity: Identity, noun: str,
        ids_of: Callable[[Any], Sequence[str]] = lambda item: [item.id],
        seen: Callable[[R], None] = lambda record: None, batch_size: int = BATCH, served: bool = False,
    ) -> Outcome:  # fmt: skip
        """Turn items into records in a file. Called again on the same file, it continues where it stopped.

        Only the ids of the records are held in memory. items: reads the items from their source; it is called twice, first to see
        that every item can be read and that no id occurs twice. ids_of: the ids of the records that an item becomes. seen: is
        called with each record of the file, those of earlier starts first. identity: of everything but the items; the `meta.input`
        of a record is the fingerprint of its item. served: a server answers; it is asked only for the missing records.

        Raises InputError where the file holds records of another identity, or of items that changed since.
        """
        contents = _contents(items(), ids_of)
        if target.claim(identity, restart=self.restart):
            for place, row in read_journal(target.path):
                _check_input(place, row, contents)
                seen(as_record(place, row, kind))
        outcome, console = Outcome(), Console(stderr=True, quiet=self.quiet)
        with Journal(target.path) as journal, progress_line(console, target.out.name, len(contents), noun) as advance:

            def fail(failure: Failure) -> None:
                if failure.id not in journal.ids:  # a batch is computed again as a whole
                    outcome.failures[failure.id] = failure

            def is_missing(item: Any) -> bool:
                return any(name not in journal.ids for name in ids_of(item))

            advance(len(journal.ids), {})
            for batch in batches(items(), batch_size, is_missing, whole=not served):
                for made in make(batch, fail):
                    record = with_input(made, contents[made.id])  # type: ignore[attr-defined]
                    if journal.append(record.to_json()):
                        advance(1, {})
                        seen(record)
            outcome.records = len(journal.ids)
            return outcome

    def end(self, outcome: Outcome, noun: str, result: dict[str, Any] | None = None) -> None:
        """Print the outcome. Raises Outage where items are still open, and NothingAnswered where no item has an answer."""
        print(outcome.line(self.out, noun), file=sys.stderr)
        self.result({**outcome.summary(), **(result or {})})
        if outcome.open:
            raise Outage(f"{self.out}: {outcome.open} {noun} are missing, since the model was out of reach")
        if outcome.nothing:
            advice = "; --restart asks everything again" if outcome.records else ""
            why = printable(next(iter(outcome.reasons), ""))
            raise NothingAnswered(f"{self.out}: nothing was answered: {why}{advice}")

    @property
    def curves(self) -> Path:
        """The directory of a training's curves."""
        return self.out.with_name(f"{self.out.name}.tensorboard")

    def directory(self, inputs: Sequence[str | None], beside: Sequence[Path] = ()) -> AbstractContextManager[Directory]:
        return directory(self.out, inputs, [self.curves, *beside])

    def training(self, inputs: Sequence[str], prepare: Callable[[], Training]) -> dict[str, Any]:
        """Train a model into --out and measure it, unless the same command already did. Returns the result of the training."""
        from solon.engines.identity import decided_dtype, of_model
        from solon.runs.trackers import tracked

        model = self["model"]
        with self.directory([*inputs, model]) as target:
            work = prepare()
            dtype = decided_dtype(self.dtype, target.identity, model, "training")
            settings = {k: v for kind in self.verb.settings for k, v in self.of(kind).model_dump(mode="json").items()}
            extra = {
                o.name: self[o.name] for o in self.verb.takes if o.kind in (float, bool) and o.name not in settings
            }
            identity = {
                "verb": self.verb.name, "model": of_model(model), **work.made_from, "settings": {**settings, **extra},
                "system": self.system, "seed": self.seed, "dtype": dtype,
            }  # fmt: skip
            result = target.earlier_result(identity, restart=self.restart)
            trained = result is None
            if result is None:
                trackers = self["report_to"] or []
                with self.progress() as line, tracked(line, self.curves, self.verb.name, trackers, settings) as step:
                    result = work.train(target.path, dtype, step)
                result["left_out"] = dict(Counter(work.left_out) + Counter(result["left_out"]))
                target.write_result(identity, result)
            if work.measure and distributed.is_main() and "heldout" not in result:
                result["heldout"] = work.measure(target.path, dtype)
                target.write_result(identity, result)
        if not trained:
            self.tell_there()
        self.tell_left_out(result["left_out"], "training")
        return {"trained": trained, **result}

    def progress(self) -> AbstractContextManager[Progress]:
        return training_line(Console(stderr=True, quiet=self.quiet), self.verb.name)

    def log(self, config: dict[str, Any]) -> AbstractContextManager[Log]:
        from solon.runs.trackers import trackers

        return trackers(self.curves, self.verb.name, self["report_to"] or [], config)

    def tell(self, text: str) -> None:
        """Print one line on stderr; of several processes only the first one prints."""
        if distributed.is_main():
            print(text, file=sys.stderr)

    def tell_there(self) -> None:
        self.tell(f"{self.out}: is there already, made by the same command; --restart makes it anew")

    def tell_left_out(self, left_out: dict[str, int], where: str) -> None:
        if left_out:
            self.tell(f"left out of {where}: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}")

    def result(self, value: dict[str, Any]) -> None:
        """Print the result on stdout as one line of JSON, where --json asks for it."""
        if self["json_"]:
            out = {"out": str(self.out)} if "out" in self.given and self.given["out"] is not None else {}
            print(json.dumps({**out, **value}, ensure_ascii=False))


def _contents(items: Iterable[Any], ids_of: Callable[[Any], Sequence[str]]) -> dict[str, str]:
    """The fingerprint of the item, by the id of each record that the item becomes. Raises InputError where an id occurs twice."""
    contents: dict[str, str] = {}
    for item in items:
        fingerprint = of_input(item)
        for name in ids_of(item):
            if name in contents:
                raise InputError(f'the id "{name}" (or the very same record) stands twice; make ids unique')
            contents[name] = fingerprint
    if not contents:
        raise InputError("no records to work on; one JSON object a line")
    return contents


def _check_input(place: str, row: dict[str, Any], contents: Mapping[str, str]) -> None:
    name, meta = row["id"], row.get("meta")
    if name not in contents:
        raise InputError(f'{place}: a record of another input ("{printable(name, 80)}"); {BEGIN_ANEW}')
    if not isinstance(meta, dict) or meta.get("input") != contents[name]:
        raise InputError(f'{place}: was made of another text than "{printable(name, 80)}" has now; {BEGIN_ANEW}')
