"""The line and the exit code for every failure of a command.

2: a person can mend it (`InputError`; a path that leads nowhere). 1: the machine or a service failed (a full disk, no
memory, an outage), or Solon itself is at fault. Every failure is one line on stderr. The traceback of a fault of Solon
goes to a file, or to stderr where SOLON_DEBUG=1 is set.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback

from pydantic import ValidationError

from solon import plugins
from solon.errors import Diverged, InputError, NothingAnswered, Outage, printable

RESUME_HINT = "everything finished so far is kept; run the same command again to go on"
MACHINE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file grew larger than this file system or the limit (ulimit -f) allows",
    errno.EROFS: "the file system is read-only; choose a place that can be written",
    errno.EACCES: "this user has no permission; choose another place or change its permissions",
    errno.EPERM: "the system does not permit it; choose another place or change its permissions",
    errno.EIO: "the disk reports an input/output error; check the disk",
    errno.ENOMEM: "the machine has no memory left; use a smaller batch or model",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ESTALE: "the network file system lost the file; mount it again",
    errno.EAGAIN: "the machine has no more processes or threads to give",
}
PATHS = {
    errno.ENOENT: "no such file or folder; correct the path, or make the folder first",
    errno.EISDIR: "is a folder; give a file",
    errno.ENOTDIR: "leads through a file as if it were a folder; correct the path",
    errno.EEXIST: "is there already; give a new name",
    errno.ENOTEMPTY: "is a folder that is not empty; give a new name",
    errno.ENAMETOOLONG: "the name is too long for this file system; give a shorter one",
    errno.ELOOP: "its symbolic links lead in a circle; correct them",
    errno.EINVAL: "is no name that this file system takes; correct the path",
}
_OS_ERROR = re.compile(r"os error (\d+)")  # the words of libraries in Rust: safetensors, tokenizers
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_KEY_NAME = re.compile(r"SOLON_API_KEY|API_KEY$|_TOKEN$|SECRET")


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error. The traceback of a fault of Solon is written to a file."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, Diverged | NothingAnswered):
        return 1, str(error)
    if isinstance(error, Outage):
        return 1, f"{error}; {RESUME_HINT}"
    if isinstance(error, ValidationError) and error.title.endswith("Settings"):
        first = error.errors()[0]
        name = "".join(f"--{str(x).replace('_', '-')}: " for x in first["loc"][:1])
        return 2, name + first["msg"].removeprefix("Value error, ")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        device = " (the GPU's memory is full)" if "CUDA" in str(error) else ""
        return 1, f"{MACHINE[errno.ENOMEM]}{device}; {RESUME_HINT}"
    return _explain_system_error(error) or (1, _report_fault(error))


def _package_at_fault(error: BaseException) -> str:
    """The package that raised the error: "solon", or a package that adds to Solon by entry point."""
    packages = {"solon", *plugins.packages()}
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((p for name in reversed(list(names)) if (p := name.partition(".")[0]) in packages), "solon")


def _explain_system_error(error: BaseException) -> tuple[int, str] | None:
    """The line for an error that the operating system or the model hub raised; None for any other."""
    if isinstance(error, ConnectionError | TimeoutError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if match := _OS_ERROR.search(str(error)):
        number = int(match[1])
    path = getattr(error, "filename", None)
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
    if number in MACHINE:
        return 1, f"{where}{MACHINE[number]}; {RESUME_HINT}"
    if number in PATHS and where:
        return 2, f"{where}{PATHS[number]}"
    module = type(error).__module__.partition(".")[0]
    if module == "huggingface_hub" or (module == "builtins" and type(error) is OSError and number is None):
        return 2, f"{_first_line(error)}; give a model's directory, or fetch the model first"
    return None


def _report_fault(error: BaseException) -> str:
    """The line for a fault of Solon or of a package that adds to it. The line names the file of the traceback."""
    summary = f"{type(error).__name__}: {_first_line(error)}"
    text = without_keys("".join(traceback.format_exception(error)))
    try:
        handle, path = tempfile.mkstemp(prefix="solon-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        path = "nowhere, since no temporary file can be written; SOLON_DEBUG=1 shows it"
    package = _package_at_fault(error)
    whose = "Solon, please report it" if package == "solon" else f"the package {package}"
    return f"this is a fault of {whose} ({without_keys(summary)}); the traceback is in {path}; {RESUME_HINT}"


def without_keys(text: str) -> str:
    """`text` without the keys and tokens that the environment holds."""
    for name, value in os.environ.items():
        if _KEY_NAME.search(name) and len(value.strip()) >= 8:
            text = text.replace(value.strip(), "[key]")
    return text


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(lines[0], 200) if lines else type(error).__name__
