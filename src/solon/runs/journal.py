"""An append-only JSONL journal that survives being killed at any instant.

One `os.write` a record, so the kernel has the whole line or none of it to lose. A last line that a kill tore is cut off
when the journal is opened for writing; reading changes nothing. Any other line that cannot be read is an error that
names it, and nothing is cut. Synced to disk each second and at the end.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pydantic import ValidationError

from solon.engines.base import Usage
from solon.errors import InputError, printable
from solon.records import Record

R = TypeVar("R", bound=Record)


def read_journal(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line, place as "FILE:LINE". Nothing is written; a torn last line is passed over.

    Raises InputError for any other line that is no JSON object with an "id", and for an id that stands twice.
    """
    if not path.is_file():
        return
    seen: set[str] = set()
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
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if not line.endswith(b"\n") and (line.startswith(b"{") or not line.strip(b"\0")):
                    return  # the last one, torn by a kill, or zeros where the machine lost its power
                raise _damaged(place, f"not a record ({type(error).__name__})") from None
            if name in seen:
                raise _damaged(place, f'the id "{printable(name, 80)}" stands twice')
            seen.add(name)
            yield place, record


def _damaged(place: str, why: str) -> InputError:
    return InputError(
        f"{place}: the journal is damaged: {why}. Nothing was changed; remove this line, or the whole file"
    )


def as_record(place: str, row: dict[str, Any], kind: type[R]) -> R:
    """A journal's line as a record of its kind. Raises InputError, with the place, where it is none."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise _damaged(place, f"{where}: {first['msg']}") from None


class Journal:
    """A journal open for writing. Open only what is Solon's own: a torn last line is cut off."""

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        """keep: hold the records in memory; without it only their ids are, and `read_journal` reads them again."""
        self.path, self._keep = path, keep
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        for _, record in read_journal(path):  # before anything is cut: a damaged file is left as it is
            self.ids.add(record["id"])
            if keep:
                self.records.append(record)
        _mend_tail(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> bool:
        """Write a record unless its id is there already; True if it was written."""
        if record["id"] in self.ids:
            return False
        append_line(self._file, record, self.path)
        self.ids.add(record["id"])
        if self._keep:
            self.records.append(record)
        if time.monotonic() - self._synced > 1:
            self.sync()
        return True

    def sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def append_line(file: int, value: Any, path: Path) -> None:
    """One JSON line in one `os.write`. What a full disk takes only in part is taken back, and told as OSError."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", errors="surrogatepass")
    written = os.write(file, line)
    if written != len(line):
        os.ftruncate(file, os.fstat(file).st_size - written)
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))


def _mend_tail(path: Path) -> None:
    """After a kill: end a last line that is whole but for its line break, and cut off one that is torn."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        whole = size = file.seek(0, os.SEEK_END)
        while whole:
            start = max(0, whole - (1 << 16))
            file.seek(start)
            found = file.read(whole - start).rfind(b"\n")
            if found >= 0:
                whole = start + found + 1
                break
            whole = start
        if whole == size:
            return
        file.seek(whole)
        try:
            complete = isinstance(json.loads(file.read())["id"], str)
        except (ValueError, TypeError, KeyError, RecursionError):
            complete = False
        if complete:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(whole)


class Tally:
    """What engines reported, journalled as they report it, so that a kill loses none of it. `used` is the sum of all starts."""

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
        with self._lock:  # engines behind endpoints report from threads of their own
            append_line(self._file, [requests, prompt_tokens, completion_tokens, cost_usd], self.path)
            self.used.add(requests, prompt_tokens, completion_tokens, cost_usd)

    def close(self) -> None:
        os.close(self._file)
