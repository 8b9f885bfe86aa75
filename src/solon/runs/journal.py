"""An append-only JSONL journal that survives being killed at any instant.

One `os.write` a record, so the kernel has the whole line or none of it to lose; a torn last line is cut off when
the journal is opened again. Synced to disk each second and at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    def __init__(self, path: Path, *, keep: bool = True) -> None:
        """keep: hold the records in memory; without it only their ids are, and `replay` reads them again."""
        self.path, self._keep = path, keep
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_tail(path)
        self.records = list(self.replay()) if keep else []
        self.ids = {r["id"] for r in (self.records if keep else self.replay())}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> bool:
        """Write a record unless its id is there already; True if it was written."""
        if record["id"] in self.ids:
            return False
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
        written = os.write(self._file, line)
        if written != len(line):  # a full disk
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        self.ids.add(record["id"])
        if self._keep:
            self.records.append(record)
        if time.monotonic() - self._synced > 1:
            self.sync()
        return True

    def replay(self) -> Iterator[dict[str, Any]]:
        """The records in the file, one at a time."""
        if self.path.is_file():
            with self.path.open("rb") as file:
                for line in file:
                    if line.strip():
                        yield json.loads(line)

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


def _cut_torn_tail(path: Path) -> None:
    """Cut off what a killed writer left after the last whole line."""
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
        if whole != size:
            file.truncate(whole)
