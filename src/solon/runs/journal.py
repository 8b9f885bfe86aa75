"""An append-only JSONL journal that survives a kill at any instant, and the records that go into it.

Each record is one `os.write`, so the kernel has the whole line or nothing. A last line that a kill tore is cut off when the journal
is opened for writing; reading changes nothing. Any other line that cannot be read is an error that names the line, and nothing is
cut. The journal is synced to disk each second and at the end.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from solon import __version__
from solon.constitution import Constitution
from solon.engines import Engine, Usage
from solon.errors import InputError, printable
from solon.records import Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")
NOT_A_RECORD = (ValueError, TypeError, KeyError, RecursionError)  # what a damaged line raises when it is read


def read_journal(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line; place is "FILE:LINE". Reading writes nothing and ignores a torn last line.

    Raises InputError for any other line that is no JSON object with an "id", and for an id that occurs twice.
    """
    if not path.is_file():
        return
    ids: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                record = json.loads(line)
                name = record["id"]
                if not isinstance(name, str):
                    raise ValueError('"id" is not a text')
            except NOT_A_RECORD as error:
                if not line.endswith(b"\n") and (line.startswith(b"{") or not line.strip(b"\0")):
                    return  # the last line: torn by a kill, or zeros where the machine lost its power
                raise _damaged(place, f"not a record ({type(error).__name__})") from None
            if name in ids:
                raise _damaged(place, f'the id "{printable(name, 80)}" stands twice')
            ids.add(name)
            yield place, record


def _damaged(place: str, why: str) -> InputError:
    return InputError(
        f"{place}: the journal is damaged: {why}. Nothing was changed; remove this line, or the whole file"
    )


def as_record(place: str, row: dict[str, Any], kind: type[R]) -> R:
    """A line of a journal as a record of its kind. Raises InputError, with the place, where the line is no such record."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise _damaged(place, f"{where}: {first['msg']}") from None


class Journal:
    """A journal that is open for writing. Use as a context manager, on a file of Solon's only: a torn last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.ids = {record["id"] for _, record in read_journal(path)}  # raises before anything of a damaged file is cut
        _mend_tail(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> bool:
        """Write a record unless its id is in the journal already. Returns whether it was written."""
        if record["id"] in self.ids:
            return False
        append_line(self._file, record, self.path)
        self.ids.add(record["id"])
        if time.monotonic() - self._synced > 1:
            os.fsync(self._file)
            self._synced = time.monotonic()
        return True

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        os.close(self._file)


def append_line(file: int, value: Any, path: Path) -> None:
    """Write one JSON line in one `os.write`. Where a full disk takes only a part, remove the part and raise OSError."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", errors="surrogatepass")
    written = os.write(file, line)
    if written != len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))


def _mend_tail(path: Path) -> None:
    """After a kill: end a last line that is whole but for its line break, and cut off a last line that is torn."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        whole = size = file.seek(0, os.SEEK_END)
        while whole:  # look for the last line break from the end, 64 KiB at a time
            start = max(0, whole - (1 << 16))
            file.seek(start)
            line_break = file.read(whole - start).rfind(b"\n")
            if line_break >= 0:
                whole = start + line_break + 1
                break
            whole = start
        if whole == size:
            return
        file.seek(whole)
        try:
            complete = isinstance(json.loads(file.read())["id"], str)
        except NOT_A_RECORD:
            complete = False
        if complete:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(whole)


def batches(items: Iterable[T], size: int, is_missing: Callable[[T], bool], *, whole: bool) -> Iterator[list[T]]:
    """The batches of `size` items in which an item is missing.

    The batches are the same however often the work was killed. whole: give such a batch as a whole, because the numbers of a model
    in this process depend, by rounding, on the other texts of the batch; otherwise give only the missing items of the batch.
    """
    source = iter(items)
    while batch := list(islice(source, size)):
        if missing := [item for item in batch if is_missing(item)]:
            yield batch if whole else missing


def with_input(record: R, fingerprint: str) -> R:
    """The record with the fingerprint of the item that it was made from in `meta.input`, where the record has a `meta`."""
    if not hasattr(record, "meta"):
        return record
    return record.model_copy(update={"meta": {**record.meta, "input": fingerprint}})


def provenance(constitution: Constitution, engine: Engine, seed: int, **more: Any) -> dict[str, Any]:
    """The `meta` of a record: the constitution, the model, the seed and the version of Solon that made it."""
    return {
        "constitution": constitution.fingerprint,
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "seed": seed,
        "solon": __version__,
        **more,
    }


class Tally:
    """The usage that engines reported, written down as they report it, so that a kill loses none of it.

    used: the sum over all starts of the stage.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.used, self._lock = path, Usage(), threading.Lock()
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for line in lines:
            try:
                requests, read, written, cost = json.loads(line)
                self.used.add(int(requests), int(read), int(written), None if cost is None else float(cost))
            except (ValueError, TypeError, OverflowError, RecursionError):  # torn by a kill, or damaged
                continue
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if lines and not lines[-1].endswith(b"\n"):
            os.write(self._file, b"\n")

    def add(self, requests: int, prompt_tokens: int, completion_tokens: int, cost_usd: float | None) -> None:
        """Write down one report of an engine. cost_usd: US dollars; None where the model's price is not known."""
        with self._lock:  # engines behind endpoints report from several threads
            append_line(self._file, [requests, prompt_tokens, completion_tokens, cost_usd], self.path)
            self.used.add(requests, prompt_tokens, completion_tokens, cost_usd)

    def close(self) -> None:
        os.close(self._file)
