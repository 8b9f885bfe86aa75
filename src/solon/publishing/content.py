"""The content of models and files on disk, as hashes."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from solon.publishing.places import MARK
from solon.records import fingerprint

WHOLE = 2 << 30  # bytes: the weight files of a model of up to this size are read whole, those of larger ones in places


DESCRIBES = {MARK, "README.md", ".gitattributes", "COMPLETE"}  # says something of a model and changes nothing in it


def of_directory(where: Path) -> str:
    """The fingerprint of a model's directory; its own place and name are no part of it."""
    files = sorted(p for p in where.rglob("*") if p.is_file() and p.name not in DESCRIBES)
    whole = sum(p.stat().st_size for p in files) <= WHOLE
    parts = [
        (path.relative_to(where).as_posix(), _content(path, *_version(path)))
        for path in files
        if whole or path.suffix != ".safetensors"
    ]
    return fingerprint("model", parts, None if whole else weights_fingerprint(where))


def of_files(where: Path) -> dict[str, str]:
    """The content of each file in a directory but the mark, by its path in it. A link counts as where it leads."""
    files = [p for p in sorted(where.rglob("*")) if (p.is_symlink() or p.is_file()) and p != where / MARK]
    return {
        p.relative_to(where).as_posix(): f"link to {p.readlink()}" if p.is_symlink() else _content(p, *_version(p))
        for p in files
    }


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.cache
def _content(path: Path, *version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(where: Path) -> str:
    """From the bytes that decide: the config, and of each weight file its header and every tensor's first bytes.

    Training with adapters on the top blocks leaves the other tensors as they were, so all of them are looked at.
    """
    parts = []
    for path in sorted(where.glob("*.safetensors")):
        seen = hashlib.sha256()
        with path.open("rb") as file:  # https://github.com/huggingface/safetensors#format
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            seen.update(header)
            starts = [x["data_offsets"][0] for name, x in json.loads(header).items() if name != "__metadata__"]
            for start in sorted(starts):
                file.seek(8 + len(header) + start)
                seen.update(file.read(4096))
        parts.append([path.name, path.stat().st_size, seen.hexdigest()])
    return fingerprint("weights", parts, json.loads((where / "config.json").read_text()))
