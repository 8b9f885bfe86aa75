"""Files of records and of results, each with a mark."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solon import __version__
from solon.errors import InputError
from solon.publishing.places import Identity, check_identity, exclusive, free_name, mark_of, resolve_output, write_whole

BEGIN_ANEW = "give another --out, or --restart to begin anew (the records are kept as NAME.old)"


def check_file(path: Path, out: Path) -> None:
    """Raises InputError unless a file may be written at `path`: the path is absent, empty or marked as Solon's."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise InputError(f"--out {out}: is not a file; give the name of a new file")
    if path.stat().st_size and mark_of(mark_path(path)) is None:
        raise InputError(
            f"--out {out}: holds something that is not known to be Solon's (there is no {mark_path(out).name} beside it); "
            "nothing was changed. Give a new file"
        )
    if not os.access(path, os.W_OK):
        raise InputError(f"--out {out}: cannot be written; change its permissions or give another file")


def check_json(path: Path) -> None:
    """Raises InputError unless a JSON file of results may be written at `path`: the path is absent, empty or Solon's."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise InputError(f"{path}: is not a file; give another name")
    if path.stat().st_size and mark_of(path) is None:
        raise InputError(
            f"{path}: holds something that Solon did not write; nothing was changed. Move it, or give another --out"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write results as JSON. The key `solon` holds Solon's version; by this key Solon recognises the file later."""
    write_whole(path, json.dumps({"solon": __version__, **value}, ensure_ascii=False, indent=1) + "\n")


def mark_path(path: Path) -> Path:
    """The path of a file's mark: labels.jsonl.solon.json for labels.jsonl."""
    return path.with_name(f"{path.name}.solon.json")


@dataclass
class File:
    """A file that this command may write. No other process writes it meanwhile."""

    path: Path
    out: Path  # as the user called it

    @property
    def identity(self) -> Identity:
        """The identity of the records in the file; empty where there are no records."""
        identity = (mark_of(mark_path(self.path)) or {}).get("identity") if self._has_records() else None
        return identity if isinstance(identity, dict) else {}

    def _has_records(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size > 0

    def claim(self, identity: Identity, *, restart: bool) -> bool:
        """Mark the file for an identity. Returns whether it holds records of the same identity, to continue with.

        Raises InputError where the file holds records of another identity. With `restart` they are kept as NAME.old.
        """
        if self._has_records() and not restart:
            check_identity(self.out, self.identity, identity, BEGIN_ANEW)
            return True
        if self._has_records():
            os.rename(self.path, free_name(self.path.with_name(f"{self.path.name}.old")))
        text = json.dumps({"solon": __version__, "identity": dict(identity)}, indent=1, ensure_ascii=False)
        write_whole(mark_path(self.path), text + "\n")
        return False


@contextmanager
def file(out: Path, inputs: Iterable[str | Path | None] = (), beside: Iterable[Path] = ()) -> Iterator[File]:
    """Open a file for writing, before any work. beside: JSON files of results that the command writes too.

    Raises InputError where the file is not Solon's or is an input, and where another process writes it.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: the output is JSON Lines; give it a name that ends in .jsonl")
    path = resolve_output(out, inputs)
    check_file(path, out)
    for other in (mark_path(path), *beside):
        check_json(resolve_output(other, inputs))
    with exclusive(path, out):
        check_file(path, out)
        yield File(path, out)
