"""Stages on their own, from file to file: the same journal and progress as in a run, without the run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from solon.constitution import Constitution
from solon.engines import LazyEngine
from solon.engines.base import Engine
from solon.errors import InputError
from solon.feedback.feedback_model import as_pairs, own_principles
from solon.feedback.judge import Judging, compare
from solon.feedback.questions import HHH, Example
from solon.feedback.ranking import preferences, rank
from solon.feedback.trust import Trust
from solon.prompts.readers import stream_pairs
from solon.records import Candidates, Comparison, Pair, Record, SFTExample
from solon.runs.journal import Journal
from solon.runs.progress import progress_line
from solon.terminal import Console, note

R = TypeVar("R", bound=Record)
BATCH = 64  # records worked on together


def to_file(
    out: Path,
    items: Sequence[Any],
    make: Callable[[Sequence[Any]], Iterable[R]],
    kind: type[R],
    *,
    quiet: bool,
    what: str,
) -> list[R]:
    """Turn items into records of the same ids in `out`. Run again on the same file, it goes on where it stopped."""
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: the output is JSON Lines; give it a name that ends in .jsonl")
    with (
        Journal(out) as journal,
        progress_line(Console(stderr=True, quiet=quiet), out.name, len(items), what) as advance,
    ):
        strangers = journal.ids - {item.id for item in items}
        if strangers:
            raise InputError(f'{out}: holds records of other inputs ("{next(iter(strangers))}"); give a new file')
        advance(len(journal.ids), {})
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            if all(item.id in journal.ids for item in batch):
                continue
            for record in make(batch):
                if journal.append(record.to_json()):
                    advance(1, {})
        return [kind.model_validate(r) for r in journal.records]


def stream_to_file(
    out: Path,
    items: Callable[[], Iterable[Any]],
    make: Callable[[Sequence[Any]], Iterable[R]],
    kind: type[R],
    *,
    made_of: Callable[[Any], Sequence[str]],
    seen: Callable[[R], None],
    quiet: bool,
    what: str,
) -> int:
    """As `to_file`, in memory that does not grow with the records but for their ids. Returns how many there are.

    items: reads the items from their source, and is called twice: once to see that all of them can be read, and that
    no id stands twice, before the first is worked on. made_of: the ids of the records an item becomes. seen: called
    with each record in `out`, those of an earlier start first.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: the output is JSON Lines; give it a name that ends in .jsonl")
    known: set[str] = set()
    for item in items():
        for name in made_of(item):
            if name in known:
                raise InputError(f'the id "{name}" (or the very same record) stands twice; make ids unique')
            known.add(name)
    if not known:
        raise InputError("no records to work on; one JSON object a line")
    with (
        Journal(out, keep=False) as journal,
        progress_line(Console(stderr=True, quiet=quiet), out.name, len(known), what) as advance,
    ):
        if strangers := journal.ids - known:
            raise InputError(f'{out}: holds records of other inputs ("{next(iter(strangers))}"); give a new file')
        for row in journal.replay():
            seen(kind.model_validate(row))
        advance(len(journal.ids), {})
        left = iter(items())
        while batch := list(islice(left, BATCH)):
            if all(name in journal.ids for item in batch for name in made_of(item)):
                continue
            for record in make(batch):
                if journal.append(record.to_json()):
                    advance(1, {})
                    seen(record)
        return len(journal.ids)


def measure_judge(
    model: str, comparisons: Sequence[Comparison], constitution: Constitution, *, system: str | None, dtype: str
) -> dict[str, Any]:
    """How far a judge can be trusted, on comparisons that people labelled, each under its own principle."""
    trust = Trust()
    asked = own_principles(comparisons, constitution, HHH)
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        for judged in compare(as_pairs(comparisons, 0), engine, constitution, asked=asked):
            trust.add(judged)
    return trust.summary()


def label_file(
    pairs: str,
    out: Path,
    engine: Engine,
    constitution: Constitution,
    how: Judging,
    *,
    scheme: Literal["all", "tournament"] = "all",
    examples: Sequence[Example] = (),
    seed: int = 0,
    meta: Callable[[], dict[str, Any]] = dict,
    limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Comparisons of a file's pairs in `out`, and how far the judge can be trusted beside it, in OUT.trust.json.

    A prompt with more than two responses becomes comparisons of all its pairs, on one scale.
    """
    trust, source = Trust(judge=engine.name), stream_pairs(pairs)

    def items() -> Iterator[Pair | Candidates]:
        return islice(source, limit)

    def made_of(item: Pair | Candidates) -> list[str]:
        if isinstance(item, Pair):
            return [item.id]
        return [f"{item.id}/{i}-{j}" for i, j in combinations(range(len(item.responses)), 2)]

    def make(batch: Sequence[Pair | Candidates]) -> Iterator[Comparison]:
        two = [item for item in batch if isinstance(item, Pair)]
        more = [item for item in batch if isinstance(item, Candidates)]
        yield from compare(two, engine, constitution, how, examples=examples, seed=seed, meta=meta())
        for ranking in rank(more, engine, constitution, how, scheme=scheme, examples=examples, seed=seed, meta=meta()):
            yield from preferences(ranking)

    n = stream_to_file(
        out, items, make, Comparison, made_of=made_of, seen=trust.add, quiet=quiet, what="comparisons"
    )  # fmt: skip
    summary = trust.summary()
    aside = out.with_suffix(".trust.json")
    aside.write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if source.repeated:
        note(f"{pairs}: {source.repeated} of its records stand there more than once and are taken once")
    return {
        "out": str(out), "records": n, "repeated": source.repeated, "trust": str(aside),
        "findings": summary["findings"], "summary": summary,
    }  # fmt: skip


def score_file(rewards: Any, name: str, out: Path, *, limit: int | None, quiet: bool) -> int:
    """Scores for a file of conversations (`score`) or of pairs and comparisons (`chosen_score`, `rejected_score`)."""
    from solon.prompts import read_demonstrations, read_pairs
    from solon.prompts.readers import first_line
    from solon.records import assistant

    sided = any(key in first_line(name) for key in ("chosen", "responses"))
    items: list[Any] = (read_pairs(name) if sided else read_demonstrations(name))[:limit]
    chats = [
        (*i.prompt, assistant(text)) for i in items for text in i.responses
    ] if sided else [i.messages for i in items if isinstance(i, SFTExample)]  # fmt: skip
    with progress_line(Console(stderr=True, quiet=quiet), out.name, len(chats), "scores") as advance:
        scores: list[float] = []
        for start in range(0, len(chats), 256):
            scores += rewards.score(chats[start : start + 256])
            advance(len(scores) - start, {})
    rows = []
    for n, item in enumerate(items):
        found = {"scores": scores[2 * n : 2 * n + 2]} if sided else {"score": scores[n]}
        rows.append({**item.to_json(), **found})
    with tempfile.NamedTemporaryFile("w", dir=out.parent, delete=False, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(file.name).replace(out)
    return len(rows)
