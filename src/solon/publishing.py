"""What Solon may write over, and how a finished thing takes the place of an old one.

Only what is absent, empty or Solon's own is written or replaced. Solon knows its own by a mark: `solon.json` in a
directory, with the names and contents of all files that Solon put there, and `NAME.solon.json` beside a file. The mark
also keeps the output's identity: everything that made it. A command that finds an output of another identity says what
differs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from solon import __version__, processes
from solon.errors import InputError, printable
from solon.terminal import note

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


# --- what stands there ---------------------------------------------------------------------------------------


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


def strangers(directory: Path) -> list[str]:
    """The names of what is in a directory and was not put there by Solon, sorted."""
    mark = mark_of(directory / MARK)
    ours = {MARK, *map(str, mark.get("files", []))} if mark else set()
    found = []
    for folder, names, files in os.walk(directory):
        inside = Path(folder).relative_to(directory)
        for name in [*files, *[n for n in names if (Path(folder) / n).is_symlink()]]:
            at = (inside / name).as_posix()
            if at not in ours and not re.fullmatch(
                rf"\.{re.escape(MARK)}\.\d+", at
            ):  # a mark that a kill left unfinished
                found.append(at)
        if not names and not files and folder != str(directory):  # an empty folder of the user's is theirs too
            found.append(inside.as_posix())
    return sorted(found)


def check_directory(place: Path, out: Path) -> None:
    """Raises InputError unless a directory may be written or replaced there. out: as the user called it."""
    if place in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise InputError(f"--out {out}: is the folder you are in, or one that holds it; give a folder of its own")
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise InputError(f"--out {out}: is a file; give the name of a new directory")
    if found := strangers(place):
        names = ", ".join(printable(n, 40) for n in found[:3]) + (", …" if len(found) > 3 else "")
        raise InputError(
            f"--out {out}: holds {len(found)} files that Solon did not put there ({names}); nothing was changed. Give a "
            "new or empty directory; what an older Solon wrote you can remove or move away yourself"
        )


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


# --- directories ---------------------------------------------------------------------------------------------


def new_directory(out: Path) -> Path:
    """A directory beside `out` to write in; `publish` then puts it in the place of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.solon-part-", dir=out.parent))


def publish(part: Path, out: Path) -> None:
    """Put a finished directory in its place: everything on disk first, then old aside, new in place, old deleted.

    A process that is killed in between leaves both; `recover` ends what it began. An old directory whose files somebody
    changed since is not deleted but kept beside, as NAME.earlier, and said.
    """
    out = Path(os.path.realpath(out))
    _finish(out)
    check_directory(out, out)
    mark = {"solon": __version__, "files": _files(part)}
    write_whole(part / MARK, json.dumps(mark, indent=1) + "\n")
    for path in (*part.rglob("*"), part):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    part.chmod(0o755)
    os.rename(part, _beside(out, "new"))
    _finish(out)


def recover(out: Path) -> None:
    """End what a killed start began there: `out` is the new directory where that was whole, and else the old one.

    Call with the lock of `out` held.
    """
    _finish(out)
    for part in out.parent.glob(f".{_literal(out.name)}.solon-part-*"):
        shutil.rmtree(part, ignore_errors=True)


def recover_all(folder: Path) -> None:
    """`recover` every directory in a folder that a killed start left something of."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            if found := re.fullmatch(r"\.(.+)\.solon-(?:new|old|part-.*)", path.name):
                recover(folder / found[1])


def _finish(out: Path) -> None:
    new, old = _beside(out, "new"), _beside(out, "old")
    if mark_of(new / MARK):
        if os.path.lexists(out):
            check_directory(out, out)
            if os.path.lexists(old):
                _drop(old, out)
            os.rename(out, old)
        os.rename(new, out)
    elif mark_of(old / MARK) and not os.path.lexists(out):
        os.rename(old, out)
    if mark_of(old / MARK) or _is_empty(old):
        _drop(old, out)


def _drop(old: Path, out: Path) -> None:
    """Delete what a new directory has replaced, or keep it where it may hold somebody's own changes."""
    written = (mark_of(old / MARK) or {}).get("files")  # a list: by an older Solon, which kept no contents
    written = written if isinstance(written, dict) else {}
    if any(written.get(name) != content for name, content in _files(old).items()):
        kept = _free(out.with_name(f"{out.name}.earlier"))
        os.rename(old, kept)
        note(f"{out}: the old files are kept in {kept}, since they are not known to be as Solon wrote them")
        return
    going = _free(out.with_name(f".{out.name}.solon-part-{os.getpid()}"))
    os.rename(old, going)  # a kill while it is deleted leaves what `recover` deletes
    shutil.rmtree(going)


def _files(directory: Path) -> dict[str, str]:
    """The content of each file that stands in a directory, the mark left out."""
    from solon.identity import of_files

    return of_files(directory)


def _beside(out: Path, state: str) -> Path:
    return out.with_name(f".{out.name}.solon-{state}")


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _literal(name: str) -> str:
    """`name` as a glob pattern that matches itself alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@dataclass
class Directory:
    """A directory that a command may write, and nobody else writes meanwhile."""

    path: Path
    out: Path  # as the user called it

    def settled(self, identity: Identity, *, restart: bool) -> dict[str, Any] | None:
        """What an earlier start of the same command noted here, or None where the work is to be done.

        Raises InputError where something of another identity stands here, unless `restart`.
        """
        mark = mark_of(self.path / MARK)
        if mark is None or restart:
            return None
        advice = "give another --out, or --restart to make it anew in its place"
        if "identity" not in mark:
            raise InputError(f"{self.out}: Solon made it in another way than by this command; {advice}")
        check_identity(self.out, mark["identity"], identity, advice)
        if "content" in mark and mark["content"] != _content_of(self.path):
            raise InputError(f"{self.out}: its files are not those that Solon wrote there; {advice}")
        result = mark.get("result")
        return result if isinstance(result, dict) else None

    @property
    def identity(self) -> Identity:
        """Of what stands there already; empty where nothing does."""
        found = (mark_of(self.path / MARK) or {}).get("identity")
        return found if isinstance(found, dict) else {}

    def settle(self, identity: Identity, result: Mapping[str, Any]) -> None:
        """Note what made the directory, and what was found. Of several processes the first one does."""
        if not processes.is_main():
            return
        mark = mark_of(self.path / MARK) or {"solon": __version__, "files": []}
        mark |= {"identity": dict(identity), "result": dict(result), "content": _content_of(self.path)}
        write_whole(self.path / MARK, json.dumps(mark, indent=1, ensure_ascii=False, default=str) + "\n")


def _content_of(directory: Path) -> str:
    from solon.identity import of_directory

    return of_directory(directory)


@contextmanager
def directory(out: Path, inputs: Iterable[str | Path | None] = (), beside: Iterable[Path] = ()) -> Iterator[Directory]:
    """Take a directory for writing, before any work. beside: other directories that the command writes in.

    Raises InputError where one of them is not Solon's to write, and where another process writes there.
    """
    inputs = list(inputs)
    place = checked_place(out, inputs)
    if not processes.is_main():  # of several processes that train one model the first one writes
        check_directory(place, out)
        yield Directory(place, out)
        return
    beside = list(beside)
    for folder in beside:
        check_folder(checked_place(folder, inputs), folder)
    with only_one(place, out):
        recover(place)
        check_directory(place, out)
        for folder in beside:
            claim_folder(folder)
        yield Directory(place, out)


def check_folder(place: Path, out: Path) -> None:
    """Raises InputError unless Solon may add files to a folder of its own: absent, empty or marked."""
    if os.path.lexists(place) and not place.is_dir():
        raise InputError(f"{out}: is a file, and Solon needs a folder of this name; move it, or give another --out")
    if place.is_dir() and any(place.iterdir()) and mark_of(place / MARK) is None:
        raise InputError(
            f"{out}: holds files that Solon did not put there, and Solon needs a folder of this name; move it, or give another --out"
        )


def claim_folder(folder: Path) -> None:
    """Make a folder that Solon adds files to, such as one of curves, and mark it. It was checked before."""
    folder.mkdir(exist_ok=True)
    if mark_of(folder / MARK) is None:
        write_whole(folder / MARK, json.dumps({"solon": __version__, "files": []}) + "\n")


# --- files ---------------------------------------------------------------------------------------------------


def mark_path(place: Path) -> Path:
    """Where the mark of a file is kept: labels.jsonl.solon.json for labels.jsonl."""
    return place.with_name(f"{place.name}.solon.json")


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
            os.rename(self.path, _free(self.path.with_name(f"{self.path.name}.old")))
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


def _free(path: Path) -> Path:
    """The first of path, path.2, path.3 … that is not there."""
    n, found = 1, path
    while os.path.lexists(found):
        n += 1
        found = path.with_name(f"{path.name}.{n}")
    return found
