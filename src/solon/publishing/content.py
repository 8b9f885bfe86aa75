"""Hashes of the content of models and of files on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from solon.publishing.places import MARK
from solon.records import fingerprint

WHOLE = (
    2 << 30
)  # bytes; the weight files of a model up to this size are hashed as a whole, those of a larger model in samples
DESCRIPTIONS = {
    MARK,
    "README.md",
    ".gitattributes",
    "COMPLETE",
}  # these files describe a model and change nothing in it


def of_directory(where: Path) -> str:
    """The fingerprint of a model's directory. The path and the name of the directory are no part of it."""
    files = sorted(p for p in where.rglob("*") if p.is_file() and p.name not in DESCRIPTIONS)
    whole = sum(p.stat().st_size for p in files) <= WHOLE
    parts = [
        (path.relative_to(where).as_posix(), _hash_now(path))
        for path in files
        if whole or path.suffix != ".safetensors"
    ]
    return fingerprint("model", parts, None if whole else weights_fingerprint(where))


def of_files(where: Path) -> dict[str, str]:
    """The SHA-256 of each file in a directory except the mark, by its relative path. A link is described by its target."""
    files = [p for p in sorted(where.rglob("*")) if (p.is_symlink() or p.is_file()) and p != where / MARK]
    return {
        p.relative_to(where).as_posix(): f"link to {p.readlink()}" if p.is_symlink() else _hash_now(p) for p in files
    }


def _hash_now(path: Path) -> str:
    stat = path.stat()
    return _hash(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _hash(path: Path, *version: int) -> str:
    """The SHA-256 of a file. version: changes when the file does, so that a changed file is not taken from the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(where: Path) -> str:
    """A fingerprint of the config, and of each weight file its header and the first bytes of every tensor.

    Training with adapters on the top blocks changes only some tensors, so the fingerprint looks at all of them.
    """
    parts = []
    for path in sorted(where.glob("*.safetensors")):
        digest = hashlib.sha256()
        with path.open("rb") as file:  # https://github.com/huggingface/safetensors#format
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            digest.update(header)
            tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
            for start in sorted(tensor["data_offsets"][0] for tensor in tensors):
                file.seek(8 + len(header) + start)
                digest.update(file.read(4096))
        parts.append([path.name, path.stat().st_size, digest.hexdigest()])
    return fingerprint("weights", parts, json.loads((where / "config.json").read_text()))
