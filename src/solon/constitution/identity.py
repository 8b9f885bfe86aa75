"""The identity of a constitution, for the mark of what it made."""

from __future__ import annotations

from typing import Any

from solon.constitution.model import Constitution


def of_constitution(constitution: Constitution) -> dict[str, Any]:
    return {"constitution": {"name": constitution.name, "fingerprint": constitution.fingerprint}}
