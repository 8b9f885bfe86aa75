"""Directories: a new one is written aside and takes the place of the old one as a whole."""

from __future__ import annotations

import glob
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
    exclusive,
    free_name,
    mark_of,
    resolve_output,
    write_whole,
)
from solon.terminal import note


def foreign_files(directory: Path) -> list[str]:
    """The relative paths in a directory that Solon did not write, sorted: files, links and empty folders."""
    mark = mark_of(directory / MARK)
    known = {MARK, *map(str, mark.get("files", []))} if mark else set()
    unfinished_mark = re.compile(rf"\.{re.escape(MARK)}\.\d+")  # a kill may leave one
    foreign = []
    for folder, names, files in os.walk(directory):
        relative = Path(folder).relative_to(directory)
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        paths = [(relative / name).as_posix() for name in (*files, *links)]
        foreign += [path for path in paths if path not in known and not unfinished_mark.fullmatch(path)]
        if not names and not files and folder != str(directory):
            foreign.append(relative.as_posix())
    return sorted(foreign)


def check_directory(path: Path, out: Path) -> None:
    """Raises InputError unless a directory may be written or replaced at `path`. out: the path as the user wrote it."""
    if path in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise InputError(f"--out {out}: is the folder you are in, or one that holds it; give another folder")
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise InputError(f"--out {out}: is a file; give the name of a new directory")
    if foreign := foreign_files(path):
        names = ", ".join(printable(name, 40) for name in foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise InputError(
            f"--out {out}: holds {len(foreign)} files that Solon did not put there ({names}); nothing was changed. Give a "
            "new or empty directory; you can remove or move away what an older Solon wrote"
        )


def new_directory(out: Path) -> Path:
    """A directory beside `out` to write in. `publish` then moves it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.solon-part-", dir=out.parent))


def publish(part: Path, out: Path) -> None:
    """Move a finished directory to `out`: sync its files, rename the old directory aside, rename the new one, delete the old one.

    A process that is killed in between leaves both directories, and `recover` finishes its work. An old directory in which a person
    changed files is not deleted. Solon keeps it beside `out` as NAME.earlier and says so.
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
    os.rename(part, _aside(out, "new"))
    _finish(out)


def recover(out: Path) -> None:
    """Finish what a killed process began at `out`: take the new directory where it is whole, and else the old one.

    The caller holds the lock of `out`.
    """
    _finish(out)
    for part in out.parent.glob(f".{glob.escape(out.name)}.solon-part-*"):
        shutil.rmtree(part, ignore_errors=True)


def recover_all(folder: Path) -> None:
    """Call `recover` for every directory in a folder of which a killed process left parts."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            if name := re.fullmatch(r"\.(.+)\.solon-(?:new|old|part-.*)", path.name):
                recover(folder / name[1])


def _finish(out: Path) -> None:
    new, old = _aside(out, "new"), _aside(out, "old")
    if mark_of(new / MARK):
        if os.path.lexists(out):
            check_directory(out, out)
            if os.path.lexists(old):
                _drop(old, out)
            os.rename(out, old)
        os.rename(new, out)
    elif mark_of(old / MARK) and not os.path.lexists(out):
        os.rename(old, out)
    if mark_of(old / MARK) or (old.is_dir() and not any(old.iterdir())):
        _drop(old, out)


def _drop(old: Path, out: Path) -> None:
    """Delete the replaced directory. Keep it where it may hold changes of a person."""
    written = (mark_of(old / MARK) or {}).get("files")  # an older Solon wrote a list, without the contents
    written = written if isinstance(written, dict) else {}
    if any(written.get(name) != content for name, content in of_files(old).items()):
        kept = free_name(out.with_name(f"{out.name}.earlier"))
        os.rename(old, kept)
        note(f"{out}: the old files are kept in {kept}, since they are not known to be as Solon wrote them")
        return
    # A kill during the deletion leaves a directory that `recover` deletes.
    deleted = free_name(out.with_name(f".{out.name}.solon-part-{os.getpid()}"))
    os.rename(old, deleted)
    shutil.rmtree(deleted)


def _aside(out: Path, state: str) -> Path:
    return out.with_name(f".{out.name}.solon-{state}")


@dataclass
class Directory:
    """A directory that this command may write. No other process writes it meanwhile."""

    path: Path
    out: Path  # as the user called it

    def earlier_result(self, identity: Identity, *, restart: bool) -> dict[str, Any] | None:
        """The result that an earlier start of the same command wrote down; None where the work must be done.

        Raises InputError where the directory holds an output of another identity, unless `restart`.
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
        """The identity of the existing output; empty where there is none."""
        identity = (mark_of(self.path / MARK) or {}).get("identity")
        return identity if isinstance(identity, dict) else {}

    def write_result(self, identity: Identity, result: Mapping[str, Any]) -> None:
        """Write the identity and the result into the mark. Of several processes only the first one writes."""
        if not distributed.is_main():
            return
        mark = mark_of(self.path / MARK) or {"solon": __version__, "files": []}
        mark |= {"identity": dict(identity), "result": dict(result), "content": of_directory(self.path)}
        write_whole(self.path / MARK, json.dumps(mark, indent=1, ensure_ascii=False, default=str) + "\n")


@contextmanager
def directory(out: Path, inputs: Iterable[str | Path | None] = (), beside: Iterable[Path] = ()) -> Iterator[Directory]:
    """Open a directory for writing, before any work. beside: other directories that the command writes in.

    Raises InputError where one of the directories is not Solon's to write, and where another process writes there.
    """
    inputs, beside = list(inputs), list(beside)
    path = resolve_output(out, inputs)
    if not distributed.is_main():  # where several processes train one model, the first one writes
        check_directory(path, out)
        yield Directory(path, out)
        return
    for folder in beside:
        _check_folder(resolve_output(folder, inputs), folder)
    with exclusive(path, out):
        recover(path)
        check_directory(path, out)
        for folder in beside:
            folder.mkdir(exist_ok=True)
            if mark_of(folder / MARK) is None:
                write_whole(folder / MARK, json.dumps({"solon": __version__, "files": []}) + "\n")
        yield Directory(path, out)


def _check_folder(path: Path, out: Path) -> None:
    """Raises InputError unless Solon may add files to a folder: the folder is absent, empty or marked as Solon's."""
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{out}: is a file, and Solon needs a folder of this name; move it, or give another --out")
    if path.is_dir() and any(path.iterdir()) and mark_of(path / MARK) is None:
        raise InputError(
            f"{out}: holds files that Solon did not put there, and Solon needs a folder of this name; move it, or give another --out"
        )
