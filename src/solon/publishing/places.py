"""Where Solon may write, Solon's mark at that path, and whether an existing output was made from the same parts."""

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
Identity = Mapping[str, Any]  # JSON; of a part such as {"name", "fingerprint"} only the fingerprint is compared


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the whole file or no file: write it aside, sync it, rename it.

    Half of a surrogate pair, which a model or a server may have written, is written as its escape, because UTF-8 has no code for it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def resolve_output(out: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The real path of `out`, with links followed. The path must be one that can be written at all.

    inputs: the command's inputs; names that are no paths (a hub id, a shipped set) are ignored. Raises InputError where the folder
    is missing or cannot be written, and where `out` is an input, lies in an input or contains an input.
    """
    if "\0" in str(out):
        raise InputError(f"--out {printable(str(out))}: a path holds no NUL character; correct it")
    try:
        path = Path(os.path.realpath(out, strict=False))
        folder = path.parent
        nearest = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        if not nearest.is_dir():
            raise InputError(f"--out {out}: {nearest} is a file, and nothing can be written below a file")
        if nearest != folder:
            raise InputError(f"--out {out}: the folder {folder} does not exist; make it first: mkdir -p '{folder}'")
        if os.path.lexists(path):
            os.lstat(path)  # fails for a name that is too long and for a link that leads in a circle
    except OSError as error:
        raise InputError(f"--out {out}: cannot be used ({error.strerror or error}); give another path") from None
    for name in inputs:
        if name is None or not _exists(Path(name).expanduser()):
            continue
        source = Path(os.path.realpath(Path(name).expanduser()))
        if path == source:
            raise InputError(f"--out {out}: is also an input ({name}); give a new path")
        if path in source.parents:
            raise InputError(f"--out {out}: the input {name} lies in it; give a new path")
        if source in path.parents:
            raise InputError(f"--out {out}: lies in the input {name}; give a new path outside of it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {folder} cannot be written; change its permissions or give another folder")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file can have this name
        return False


def mark_of(path: Path) -> dict[str, Any] | None:
    """The mark in a file; None where the file is absent or Solon did not write it."""
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and isinstance(mark.get("solon"), str) else None


def differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) for each difference between two identities."""
    if isinstance(old, dict) and isinstance(new, dict):
        if "fingerprint" in old and "fingerprint" in new:
            if old["fingerprint"] != new["fingerprint"]:
                yield at, _label(old), _label(new)
            return
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new


def _label(part: Mapping[str, Any]) -> str:
    return f"{part.get('name', '')} [{str(part['fingerprint'])[:8]}]".strip()


def check_identity(out: Path, old: Identity, new: Identity, advice: str) -> None:
    """Raises InputError, which names the differences, where two identities differ."""
    changes = list(differences(old, json.loads(json.dumps(new))))
    if changes:
        parts = dict.fromkeys(key.partition(".")[0] for key, _, _ in changes)
        shown = [f"{key}: {printable(str(a), 80)} → {printable(str(b), 80)}" for key, a, b in changes[:4]]
        shown += [f"{len(changes) - 4} more"] if len(changes) > 4 else []
        raise InputError(f"{out}: was made with another {' and another '.join(parts)} ({'; '.join(shown)}); {advice}")


@contextmanager
def exclusive(path: Path, out: Path) -> Iterator[None]:
    """Inside this context no other process of Solon writes to the path. The lock ends with the process, however the process ends."""
    lock = FileLock(path.with_name(f".{path.name}.solon-lock"))
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
        # Delete the file while the lock is held: a process that opened it meanwhile sees that it is gone, and tries again.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def free_name(path: Path) -> Path:
    """The first of path, path.2, path.3 … that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
