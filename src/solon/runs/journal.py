"""An append-only JSONL journal that survives being killed at any instant.

One `os.write` a record, so the kernel has the whole line or none of it to lose; a torn last line is cut off when
the journal is opened again. Synced to disk each second and at the end.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records = _recover(path)
        self.ids = {r["id"] for r in self.records}
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


def _recover(path: Path) -> list[dict[str, Any]]:
    """The whole records of a journal; a torn tail is cut off the file."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return [json.loads(line) for line in data[:whole].splitlines() if line.strip()]
