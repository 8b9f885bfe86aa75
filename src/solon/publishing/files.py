"""Files of records and of results, each with its mark."""

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
from solon.publishing.places import Identity, check_identity, checked_place, free_name, mark_of, only_one, write_whole


def check_file(place: Path, out: Path) -> None:
    """Raises InputError unless a file may be written there: absent, empty, or marked as Solon's."""
    if not os.path.lexists(place):
        return
    if not place.is_file():
        raise InputError(f"--out {out}: is not a file; give the name of a new file")
    if place.stat().st_size and mark_of(mark_path(place)) is None:
        raise InputError(
            f"--out {out}: holds something that is not known to be Solon's (there is no {mark_path(out).name} beside it); "
            "nothing was changed. Give a new file"
        )
    if not os.access(place, os.W_OK):
        raise InputError(f"--out {out}: cannot be written; change its permissions or give another file")


def check_own_json(path: Path) -> None:
    """Raises InputError unless a JSON file of results may be written there: absent, empty, or of Solon's."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise InputError(f"{path}: is not a file; give another name")
    if path.stat().st_size and mark_of(path) is None:
        raise InputError(
            f"{path}: holds something that Solon did not write; nothing was changed. Move it, or give another --out"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Results as JSON, with Solon's version in `solon`, by which Solon knows the file again."""
    write_whole(path, json.dumps({"solon": __version__, **value}, ensure_ascii=False, indent=1) + "\n")


def mark_path(place: Path) -> Path:
    """Where the mark of a file is kept: labels.jsonl.solon.json for labels.jsonl."""
    return place.with_name(f"{place.name}.solon.json")


@dataclass
class File:
    """A file that a command may write, and nobody else writes meanwhile."""

    path: Path
    out: Path  # as the user called it

    @property
    def identity(self) -> Identity:
        """Of what stands there already; empty where nothing does."""
        found = (mark_of(mark_path(self.path)) or {}).get("identity") if self._stands() else None
        return found if isinstance(found, dict) else {}

    def _stands(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size > 0

    def claim(self, identity: Identity, *, restart: bool) -> bool:
        """Whether records of the same identity stand there to go on with; the file is marked for the identity.

        Raises InputError where records of another identity stand there. With `restart` they are kept as NAME.old.
        """
        if self._stands() and not restart:
            advice = "give another --out, or --restart to begin anew (the records are kept as NAME.old)"
            check_identity(self.out, self.identity, identity, advice)
            return True
        if self._stands():
            os.rename(self.path, free_name(self.path.with_name(f"{self.path.name}.old")))
        text = json.dumps({"solon": __version__, "identity": dict(identity)}, indent=1, ensure_ascii=False)
        write_whole(mark_path(self.path), text + "\n")
        return False


@contextmanager
def file(out: Path, inputs: Iterable[str | Path | None] = (), beside: Iterable[Path] = ()) -> Iterator[File]:
    """Take a file for writing, before any work. beside: JSON files of results that the command writes too.

    Raises InputError where the file is not Solon's, is an input, or another process writes it.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: the output is JSON Lines; give it a name that ends in .jsonl")
    place = checked_place(out, inputs)
    check_file(place, out)
    for path in (mark_path(place), *beside):
        check_own_json(checked_place(path, inputs))
    with only_one(place, out):
        check_file(place, out)
        yield File(place, out)
