"""Fingerprints of records. A command or stage compares them to see whether its inputs are still the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solon.records import Chat, Record, fingerprint


def of_records(records: Sequence[Record]) -> dict[str, str]:
    """The fingerprint of records in their order."""
    return {"name": f"{len(records)} records", "fingerprint": fingerprint("records", [r.to_json() for r in records])}


def of_input(item: Any) -> str:
    """The fingerprint of one record, without its `meta` and without the order of a compared pair."""
    return fingerprint("input", {k: v for k, v in item.to_json().items() if k not in ("meta", "first")})


def of_inputs(records: Sequence[Record]) -> dict[str, str]:
    """As `of_records`, without `meta`: records that are made again with the same content have the same fingerprint."""
    return {"name": f"{len(records)} records", "fingerprint": fingerprint("inputs", [of_input(r) for r in records])}


def of_chats(chats: Sequence[Chat]) -> dict[str, str]:
    """The fingerprint of conversations in their order."""
    plain = [[m.model_dump() for m in chat] for chat in chats]
    return {"name": f"{len(chats)} conversations", "fingerprint": fingerprint("conversations", plain)}
