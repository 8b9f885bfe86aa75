"""The lines of a JSON Lines file as objects, each with its file and line. Memory stays bounded for any file.

A file that cannot be read, and a line that is not one JSON object by RFC 8259, is an InputError that names the file and
the line. `NaN` and `Infinity`, repeated keys and halves of surrogate pairs are refused too, because other readers cannot
read them. The names of the data that ships with Solon stand for files everywhere.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, cast

from solon.errors import InputError, nearest, printable

MAX_LINE = 4 << 20  # bytes: a longer line is not one record
MAX_DEPTH = 64  # brackets in brackets; a conversation needs four
BOMB_BYTES, BOMB_RATIO = 256 << 20, 200  # text compresses 3- to 30-fold; a gzip bomb about 1000-fold
SHIPPED = {
    "solon:red-team": "red_team_train.jsonl",
    "solon:red-team-heldout": "red_team_heldout.jsonl",
    "solon:helpful": "helpful_train.jsonl",
    "solon:helpful-heldout": "helpful_heldout.jsonl",
    "solon:judge-attacks": "judge_attacks.jsonl",
    "solon:demonstrations-harmless": "demonstrations_harmless.jsonl",
    "solon:demonstrations-helpful": "demonstrations_helpful.jsonl",
    "solon:revision-demonstrations": "revision_demonstrations.jsonl",
    "solon:comparisons-harmless": "comparisons_harmless.jsonl",
    "solon:comparisons-helpful": "comparisons_helpful.jsonl",
    "solon:comparisons-sampled": "comparisons_sampled.jsonl",
    "solon:comparisons-heldout": "comparisons_heldout.jsonl",
}


def shipped_path(name: str) -> Path:
    """The file behind a shipped name; any other name is a path."""
    if not name.startswith("solon:"):
        return Path(name).expanduser()
    if name not in SHIPPED:
        raise InputError(f'"{name}": nothing of this name ships with Solon{nearest(name, list(SHIPPED))}')
    return Path(str(files("solon"))) / "data/library" / SHIPPED[name]


def read_jsonl(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a .jsonl or .jsonl.gz file; place is "FILE:LINE". Blank lines are skipped."""
    path = shipped_path(name)
    if not path.is_file():
        raise InputError(f"{_no_file(name, path)}; give a .jsonl or .jsonl.gz file, or a name such as solon:red-team")
    number = 0
    try:
        with path.open("rb") as raw:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
            while line := file.readline(MAX_LINE + 1):
                number += 1
                place = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    raise InputError(f"{place}: the line is longer than {MAX_LINE >> 20} MiB; one JSON object a line")
                if file is not raw and file.tell() > max(BOMB_BYTES, BOMB_RATIO * raw.tell()):
                    raise InputError(
                        f"{place}: the file grows more than {BOMB_RATIO}-fold when unpacked; unpack it first"
                    )
                if line.strip():
                    yield place, parse_line(line, place, first=number == 1)
    except gzip.BadGzipFile as error:
        raise InputError(f"{path}: its name ends in .gz but it is not gzip-compressed; correct the name") from error
    except (EOFError, zlib.error) as error:
        raise InputError(
            f"{path}:{number + 1}: the compressed file is damaged or cut off here; copy it anew"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def first_line(name: str) -> dict[str, Any]:
    """The first object of a file, which shows its form."""
    for _, value in read_jsonl(name):
        return value
    raise empty(name)


def empty(name: str) -> InputError:
    return InputError(f"{name}: the file is empty; one JSON object a line")


def parse_line(line: bytes, place: str, *, first: bool = False) -> dict[str, Any]:
    """The object in one line. first: a byte-order mark may stand before it."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        if "\0" in text:
            raise InputError(f"{place}: holds NUL bytes, as UTF-16 text does; save the file as UTF-8")
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_distinct)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InputError(f"{place}: holds half of a surrogate pair ({half}); write the whole character") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg} at column {error.colno}); one JSON object a line") from error
    except RecursionError:
        raise InputError(f"{place}: brackets are nested more than {MAX_DEPTH} deep; no record needs that") from None
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({printable(str(error), 160)}); one JSON object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: a {type(value).__name__}; expected a JSON object")
    return value


def _depth(value: Any) -> int:
    """How deeply lists and objects are nested in each other; 0 for a text or a number."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        level = [inner for x in level for inner in (x.values() if isinstance(x, dict) else x)]
    return depth


def _no_file(name: str, path: Path) -> str:
    if not name.strip():
        return "the name of a file is empty"
    try:
        path.stat()
    except FileNotFoundError:
        return f"{name}: no such file"
    except (OSError, ValueError) as error:
        return f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})"
    return f"{name}: a folder, not a file" if path.is_dir() else f"{name}: a pipe or device, which cannot be read twice"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON; write null, or leave the key out")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    value = dict(pairs)
    if len(value) < len(keys):
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise ValueError(f'the key "{twice}" stands twice')
    return value
