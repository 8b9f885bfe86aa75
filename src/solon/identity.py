"""The content of records, by which a command or a stage sees whether its inputs are still the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solon.records import Chat, Record, fingerprint


def of_records(records: Sequence[Record]) -> dict[str, str]:
    """The content of records in their order."""
    return {"name": f"{len(records)} records", "fingerprint": fingerprint("records", [r.to_json() for r in records])}


def of_input(item: Any) -> str:
    """The content that a record is made from, without where it came from and without the order of a compared pair."""
    return fingerprint("input", {k: v for k, v in item.to_json().items() if k not in ("meta", "first")})


def of_inputs(records: Sequence[Record]) -> dict[str, str]:
    """As `of_records`, without where the records came from: made again with the same content they are the same."""
    return {"name": f"{len(records)} records", "fingerprint": fingerprint("inputs", [of_input(r) for r in records])}


def of_chats(chats: Sequence[Chat]) -> dict[str, str]:
    """The content of conversations in their order."""
    found = fingerprint("conversations", [[m.model_dump() for m in chat] for chat in chats])
    return {"name": f"{len(chats)} conversations", "fingerprint": found}
