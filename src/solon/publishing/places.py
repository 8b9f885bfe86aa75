"""Where something may be written, Solon's mark there, and whether what stands there was made from the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from solon.errors import InputError, printable

MARK = "solon.json"


Identity = Mapping[str, Any]  # JSON; a part such as {"name", "fingerprint"} is compared by its fingerprint alone


def write_whole(path: Path, text: str) -> None:
    """Write aside, sync, rename: a file is there whole or not at all.

    Half of a surrogate pair, which a model or a server may have written, becomes its escape: UTF-8 has no place for it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def checked_place(out: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The path that `out` leads to, links followed, where something may be written at all.

    inputs: what the command reads; names that are no paths (a hub id, a shipped set) are passed over. Raises InputError
    where the folder is missing or cannot be written, and where `out` is an input, lies in one or holds one.
    """
    if "\0" in str(out):
        raise InputError(f"--out {printable(str(out))}: a path holds no NUL character; correct it")
    try:
        place = Path(os.path.realpath(out, strict=False))
        folder = place.parent
        missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
        solid = next(p for p in (folder, *folder.parents) if p not in missing)
        if not solid.is_dir():
            raise InputError(f"--out {out}: {solid} is a file, and nothing can be written below a file")
        if missing:
            raise InputError(f"--out {out}: the folder {folder} does not exist; make it first: mkdir -p '{folder}'")
        os.lstat(place) if os.path.lexists(place) else None  # a name that is too long, a link that leads in a circle
    except OSError as error:
        raise InputError(f"--out {out}: cannot be used ({error.strerror or error}); give another path") from None
    for given in inputs:
        if given is None or not _exists(Path(given).expanduser()):
            continue
        source = Path(os.path.realpath(Path(given).expanduser()))
        if place == source:
            raise InputError(f"--out {out}: is also an input ({given}); give a new path")
        if place in source.parents:
            raise InputError(f"--out {out}: the input {given} lies in it; give a new path")
        if source in place.parents:
            raise InputError(f"--out {out}: lies in the input {given}; give a new path outside of it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {folder} cannot be written; change its permissions or give another folder")
    return place


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def mark_of(path: Path) -> dict[str, Any] | None:
    """The mark in a file, or None where the file is absent or is not one that Solon wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("solon"), str) else None


def differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "fingerprint" in old and "fingerprint" in new:
            if old["fingerprint"] != new["fingerprint"]:
                yield at, _named(old), _named(new)
            return
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _named(part: Mapping[str, Any]) -> str:
    return f"{part.get('name', '')} [{str(part['fingerprint'])[:8]}]".strip()


def check_identity(out: Path, old: Identity, new: Identity, advice: str) -> None:
    """Raises InputError that says what differs, where two identities do."""
    found = list(differences(old, json.loads(json.dumps(new))))
    if found:
        parts = dict.fromkeys(key.partition(".")[0] for key, _, _ in found)
        told = [f"{key}: {printable(str(a), 80)} → {printable(str(b), 80)}" for key, a, b in found[:4]]
        told += [f"{len(found) - 4} more"] if len(found) > 4 else []
        raise InputError(f"{out}: was made with another {' and another '.join(parts)} ({'; '.join(told)}); {advice}")


@contextmanager
def only_one(place: Path, out: Path) -> Iterator[None]:
    """Inside, no other process of Solon writes there. The lock ends with the process, however the process ends."""
    lock = FileLock(place.with_name(f".{place.name}.solon-lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"--out {out}: another solon process is writing there; wait for it, or give another path"
        ) from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); give another path") from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever opened it meanwhile sees that it is gone, and tries again
            os.unlink(lock.lock_file)
        lock.release()


def free_name(path: Path) -> Path:
    """The first of path, path.2, path.3 … that is not there."""
    n, found = 1, path
    while os.path.lexists(found):
        n += 1
        found = path.with_name(f"{path.name}.{n}")
    return found
