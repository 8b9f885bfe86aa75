"""Directories: a new one is written aside and takes the place of the old one as a whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solon import __version__, distributed
from solon.errors import InputError, printable
from solon.publishing.content import of_directory, of_files
from solon.publishing.places import (
    MARK,
    Identity,
    check_identity,
    checked_place,
    free_name,
    mark_of,
    only_one,
    write_whole,
)
from solon.terminal import note


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
    mark = {"solon": __version__, "files": of_files(part)}
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
    if any(written.get(name) != content for name, content in of_files(old).items()):
        kept = free_name(out.with_name(f"{out.name}.earlier"))
        os.rename(old, kept)
        note(f"{out}: the old files are kept in {kept}, since they are not known to be as Solon wrote them")
        return
    going = free_name(out.with_name(f".{out.name}.solon-part-{os.getpid()}"))
    os.rename(old, going)  # a kill while it is deleted leaves what `recover` deletes
    shutil.rmtree(going)


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
        if "content" in mark and mark["content"] != of_directory(self.path):
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
        if not distributed.is_main():
            return
        mark = mark_of(self.path / MARK) or {"solon": __version__, "files": []}
        mark |= {"identity": dict(identity), "result": dict(result), "content": of_directory(self.path)}
        write_whole(self.path / MARK, json.dumps(mark, indent=1, ensure_ascii=False, default=str) + "\n")


@contextmanager
def directory(out: Path, inputs: Iterable[str | Path | None] = (), beside: Iterable[Path] = ()) -> Iterator[Directory]:
    """Take a directory for writing, before any work. beside: other directories that the command writes in.

    Raises InputError where one of them is not Solon's to write, and where another process writes there.
    """
    inputs = list(inputs)
    place = checked_place(out, inputs)
    if not distributed.is_main():  # of several processes that train one model the first one writes
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
