"""Stages on their own, from file to file: the same journal and progress as in a run, without the run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from solon.errors import InputError
from solon.records import Record, SFTExample
from solon.runs.journal import Journal
from solon.runs.progress import progress_line

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


@contextmanager
def with_progress(name: str, quiet: bool) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """A trainer's progress callback that draws a line on stderr."""
    with progress_line(Console(stderr=True, quiet=quiet), name, 1, "steps") as advance:
        done = 0

        def step(at: int, of: int, shown: dict[str, float]) -> None:
            nonlocal done
            advance(at - done, shown, of)
            done = at

        yield step


def score_file(rewards: Any, name: str, out: Path, *, limit: int | None, quiet: bool) -> int:
    """Scores for a file of conversations (`score`) or of pairs and comparisons (`chosen_score`, `rejected_score`)."""
    from solon.prompts import read_demonstrations, read_pairs
    from solon.prompts.readers import read_jsonl
    from solon.records import assistant

    first = next(iter(read_jsonl(name)), None)
    if first is None:
        raise InputError(f"{name}: the file is empty")
    sided = any(key in first[1] for key in ("chosen", "responses"))
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
