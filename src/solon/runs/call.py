"""A verb's work, from file to file: the same journal and progress as in a run, without the run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from solon import distributed
from solon.constitution import Constitution, load_constitution
from solon.engines import Failure, LazyEngine, OnFailure
from solon.errors import InputError, NothingAnswered, Outage, nearest, printable
from solon.identity import of_input
from solon.publishing import Directory, File, Identity, directory, file
from solon.records import Record
from solon.runs.journal import Journal, as_record, read_journal
from solon.runs.options import Training, Verb, make_settings
from solon.runs.progress import progress_line, training_line
from solon.runs.provenance import provenance
from solon.settings import Settings
from solon.terminal import Console
from solon.training.settings import Log, Progress
from solon.yaml_text import assignment

R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=Settings)
BATCH = 64  # records worked on together


ANEW = "give another --out, or --restart to begin anew (the records are kept as NAME.old)"


@dataclass
class Outcome:
    """What became of a verb's items."""

    records: int = 0  # in the file now, those of earlier starts included
    failures: dict[str, Failure] = field(default_factory=dict)  # by item, of those that no record was made of
    abstained: Counter[str] = field(default_factory=Counter)  # reasons of the records that hold no answer

    @property
    def reasons(self) -> dict[str, int]:
        """Why there is no answer, the commonest reason first, and of how many items."""
        found = self.abstained + Counter(f.reason for f in self.failures.values())
        return dict(found.most_common())

    @property
    def failed(self) -> int:
        return len(self.failures) + self.abstained.total()

    def summary(self) -> dict[str, Any]:
        return {"records": self.records, "failed": self.failed, "reasons": self.reasons}

    @property
    def open(self) -> int:
        """How many items a later start may still get an answer for: the model was out of reach."""
        return sum(f.again for f in self.failures.values())

    @property
    def nothing(self) -> bool:
        """Whether no item has an answer."""
        return self.records <= self.abstained.total()

    def line(self, out: Path, what: str) -> str:
        """The outcome in one line for a person."""
        if not self.failed:
            return f"{out}: {self.records} {what}"
        told = "; ".join(f"{printable(reason, 160)} ({n})" for reason, n in list(self.reasons.items())[:3])
        more = f"; {len(self.reasons) - 3} other reasons" if len(self.reasons) > 3 else ""
        return f"{out}: {self.records} {what}; without an answer {self.failed}: {told}{more}"


def to_file(
    target: File,
    items: Callable[[], Iterable[Any]],
    make: Callable[[Sequence[Any], OnFailure], Iterable[R]],
    kind: type[R],
    *,
    identity: Identity,
    restart: bool = False,
    made_of: Callable[[Any], Sequence[str]] = lambda item: [item.id],
    seen: Callable[[R], None] = lambda record: None,
    batch_size: int = BATCH,
    served: bool = False,
    quiet: bool,
    what: str,
) -> Outcome:
    """Turn items into records in a file. Run again on the same file, it goes on where it stopped.

    Memory does not grow with the records but for their ids. items: reads the items from their source, and is called
    twice: once to see that all of them can be read, and that no id stands twice, before the first is worked on.
    made_of: the ids of the records an item becomes. seen: called with each record in the file, those of an earlier
    start first. identity: of everything but the items; a record's `meta.input` is the fingerprint of its own item. served: a
    server answers, and is asked for what is missing alone; with a model in this process a batch is made again as a
    whole, since rounding depends on what shares it.

    Raises InputError where the file holds records of another identity, or of items that are not the same any more.
    """
    known: dict[str, str] = {}
    for item in items():
        content = of_input(item)
        for name in made_of(item):
            if name in known:
                raise InputError(f'the id "{name}" (or the very same record) stands twice; make ids unique')
            known[name] = content
    if not known:
        raise InputError("no records to work on; one JSON object a line")
    if target.claim(identity, restart=restart):
        for place, row in read_journal(target.path):
            _check_input(place, row, known)
            seen(as_record(place, row, kind))
    outcome = Outcome()

    answered: set[str] = set()

    def fail(failure: Failure) -> None:
        if failure.id not in answered:  # a batch is asked again as a whole
            outcome.failures[failure.id] = failure

    with (
        Journal(target.path, keep=False) as journal,
        progress_line(Console(stderr=True, quiet=quiet), target.out.name, len(known), what) as advance,
    ):
        advance(len(journal.ids), {})
        answered = journal.ids
        left = iter(items())
        while batch := list(islice(left, batch_size)):
            missing = [item for item in batch if any(name not in journal.ids for name in made_of(item))]
            if not missing:
                continue
            if served:
                batch = missing
            for made in make(batch, fail):
                meta = {**made.meta, "input": known[made.id]}  # type: ignore[attr-defined]
                record = made.model_copy(update={"meta": meta})
                if journal.append(record.to_json()):
                    advance(1, {})
                    seen(record)
        outcome.records = len(journal.ids)
        return outcome


def _check_input(place: str, row: dict[str, Any], known: Mapping[str, str]) -> None:
    name, meta = row["id"], row.get("meta")
    if name not in known:
        raise InputError(f'{place}: a record of another input ("{printable(name, 80)}"); {ANEW}')
    if not isinstance(meta, dict) or meta.get("input") != known[name]:
        raise InputError(f'{place}: was made of another text than "{printable(name, 80)}" has now; {ANEW}')


class Call:
    """A verb as it was called: its options, and what wraps files, resume and progress around its work."""

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def __init__(self, verb: type[Verb], given: Mapping[str, Any]) -> None:
        self.verb, self.given = verb, dict(given)
        self.seed = given.get("seed") or 0
        self.system, self.dtype = given.get("system", ""), given.get("dtype", "auto")
        self.limit, self.restart, self.quiet = (
            given.get("limit"),
            given.get("restart", False),
            given.get("quiet", False),
        )
        self.out = given["out"] if given.get("out") is not None else Path()
        self._set = dict(map(assignment, given.get("set_") or []))
        known = [name for kind in verb.settings for name in kind.model_fields]
        for name in self._set:
            if name not in known:
                raise InputError(f"--set {name}: no such setting of solon {verb.name}{nearest(name, known)}")

    @property
    def constitution(self) -> Constitution:
        return load_constitution(self["constitution"])

    def of(self, kind: type[S], **changed: Any) -> S:
        """The settings of this kind, out of the options and --set. changed: fields that the verb sets itself."""
        given = {name: value for name, value in self.given.items() if value is not None}
        return make_settings(kind, {**given, **self._set, **changed})

    def engine(self) -> LazyEngine:
        return LazyEngine(self["model"], system=self.system, dtype=self.dtype)

    def meta(self, engine: LazyEngine, **more: Any) -> dict[str, Any]:
        return provenance(self.constitution, engine, self.seed, **more)

    @contextmanager
    def file(self, inputs: Sequence[str], beside: Sequence[Path] = ()) -> Iterator[File]:
        with file(self.out, inputs, beside) as target:
            yield target

    def records(self, target: File, items: Any, make: Any, kind: Any, **options: Any) -> Outcome:
        return to_file(target, items, make, kind, restart=self.restart, quiet=self.quiet, **options)

    def end(self, outcome: Outcome, what: str, result: dict[str, Any] | None = None) -> None:
        print(outcome.line(self.out, what), file=sys.stderr)
        self.result({**outcome.summary(), **(result or {})})
        if outcome.open:
            raise Outage(f"{self.out}: {outcome.open} {what} are missing, since the model was out of reach")
        if outcome.nothing:
            kept = "; --restart asks everything again" if outcome.records else ""
            why = printable(next(iter(outcome.reasons), ""))
            raise NothingAnswered(f"{self.out}: nothing was answered: {why}{kept}")

    @property
    def curves(self) -> Path:
        """Where the curves of a training go."""
        return self.out.with_name(f"{self.out.name}.tensorboard")

    @contextmanager
    def directory(self, inputs: Sequence[str | None], beside: Sequence[Path] = ()) -> Iterator[Directory]:
        with directory(self.out, inputs, [self.curves, *beside]) as target:
            yield target

    def training(self, inputs: Sequence[str], prepare: Callable[[], Training]) -> dict[str, Any]:
        from solon.engines.identity import decided_dtype, of_model

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
            again = result is not None
            if result is None:
                with self.progress() as line, self._tracked(line, settings) as step:
                    result = work.train(target.path, dtype, step)
                result["left_out"] = dict(Counter(work.left_out) + Counter(result["left_out"]))
                target.write_result(identity, result)
            if work.measure and distributed.is_main() and "heldout" not in result:
                result["heldout"] = work.measure(target.path, dtype)
                target.write_result(identity, result)
        self.tell_again(again)
        self.tell_left_out(result["left_out"], "training")
        return {"trained": not again, **result}

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        with training_line(Console(stderr=True, quiet=self.quiet), self.verb.name) as step:
            yield step

    @contextmanager
    def log(self, config: dict[str, Any]) -> Iterator[Log]:
        from solon.runs.trackers import trackers

        with trackers(self.curves, self.verb.name, self["report_to"] or [], config) as log:
            yield log

    @contextmanager
    def _tracked(self, step: Progress, config: dict[str, Any]) -> Iterator[Progress]:
        from solon.runs.trackers import tracked

        with tracked(step, self.curves, self.verb.name, self["report_to"] or [], config) as both:
            yield both

    def tell(self, text: str) -> None:
        if distributed.is_main():
            print(text, file=sys.stderr)

    def tell_again(self, again: bool) -> None:
        if again:
            self.tell(f"{self.out}: is there already, made by the same command; --restart makes it anew")

    def tell_left_out(self, left_out: dict[str, int], where: str) -> None:
        if left_out:
            self.tell(f"left out of {where}: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}")

    def result(self, value: dict[str, Any]) -> None:
        if self["json_"]:
            out = {"out": str(self.out)} if "out" in self.given and self.given["out"] is not None else {}
            print(json.dumps({**out, **value}, ensure_ascii=False))
