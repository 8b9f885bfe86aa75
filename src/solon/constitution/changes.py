"""The differences between two constitutions, and which of them reach a model."""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from solon.constitution.check import Check
from solon.constitution.files import inline_check
from solon.constitution.model import Constitution, Example, Principle

_UNSEEN = {"name", "version", "description", "title", "tags"}  # by any model


class Change(BaseModel):
    """One difference. Two constitutions have equal fingerprints exactly where no change reaches a model."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["added", "removed", "changed", "moved"]
    principle: str | None  # the id; None for a change of the constitution itself
    field: str | None  # the field's name; None unless the kind is "changed"
    before: Any  # the field's old value, the removed principle, or the old position (from 1)
    after: Any  # the field's new value, the added principle, or the new position
    reaches_model: bool


def diff(old: Constitution, new: Constitution) -> list[Change]:
    """Every difference, in the order of `new`, removed principles last; empty exactly where the two are equal.

    Principles with the same id are the same principle. The moves are the fewest that explain the new order.
    """
    changes = _fields(old, new, ("name", "version", "description"), None)
    was = {p.id: (n, p) for n, p in enumerate(old.principles)}
    common = [p.id for p in new.principles if p.id in was]
    old_rank = {i: n for n, i in enumerate(i for i in was if i in set(common))}
    stayed = {common[n] for n in _longest_rise([old_rank[i] for i in common])}
    for n, p in enumerate(new.principles):
        if p.id not in was:
            changes.append(_change("added", p.id, None, None, p))
            continue
        position, before = was[p.id]
        if p.id not in stayed:
            changes.append(_change("moved", p.id, None, position + 1, n + 1))
        changes += _fields(before, p, tuple(Principle.model_fields), p.id)
    changes += [_change("removed", i, None, p, None) for i, (_, p) in was.items() if i not in set(common)]
    return changes


def render_diff(changes: Sequence[Change]) -> str:
    """The changes as plain text, with a mark on those that no model sees, and a last line that counts them."""
    lines: list[str] = []
    for c in changes:
        unseen = "" if c.reaches_model else "  (no model sees this)"
        if c.kind == "added":
            lines.append(f"+ {c.principle}: {_shown(c.after.title)}")
        elif c.kind == "removed":
            lines.append(f"- {c.principle}: {_shown(c.before.title)}")
        elif c.kind == "moved":
            lines.append(f"> {c.principle}: moved from position {c.before} to {c.after}")
        else:
            lines.append(f"~ {c.principle}, {c.field}{unseen}" if c.principle else f"~ {c.field}{unseen}")
            lines += [*_wrapped(c.before, "    - "), *_wrapped(c.after, "    + ")]
    if not changes:
        return "no differences"
    reach = sum(c.reaches_model for c in changes)
    count = f"{len(changes)} change{'s' * (len(changes) > 1)}"
    reaching = f"{reach} reach{'es' * (reach == 1)} a model" if reach else "none reaches a model"
    return "\n".join([*lines, f"{count}: {reaching}"])


def _change(kind: Any, principle: str | None, field: str | None, before: Any, after: Any) -> Change:
    reaches = field not in _UNSEEN
    return Change(kind=kind, principle=principle, field=field, before=before, after=after, reaches_model=reaches)


def _fields(old: Any, new: Any, names: Sequence[str], principle: str | None) -> list[Change]:
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return [_change("changed", principle, name, a, b) for name, a, b in pairs if a != b]


def _longest_rise(values: Sequence[int]) -> list[int]:
    """Indices of a longest increasing subsequence of distinct values."""
    ends: list[int] = []  # smallest value that ends a rise of each length
    lengths: list[int] = []
    for value in values:
        length = bisect_left(ends, value)
        ends[length : length + 1] = [value]
        lengths.append(length)
    rise: list[int] = []
    for n in range(len(values) - 1, -1, -1):
        if lengths[n] == len(ends) - 1 - len(rise):
            rise.append(n)
    return rise[::-1]


def _shown(value: Any) -> str:
    """A value as text a terminal may print: no control characters but line breaks."""
    if isinstance(value, tuple) and value and isinstance(value[0], Example):
        parts = [f"{name}: {text}" for e in value for name, text in e.model_dump().items()]
        return _shown("\n".join(parts))
    if isinstance(value, tuple):
        return _shown(", ".join(value)) or "(none)"
    if value is None:
        return "(none)"
    if isinstance(value, Check):
        return _shown(inline_check(value))
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(value))


def _wrapped(value: Any, mark: str) -> list[str]:
    lines = [part for line in _shown(value).split("\n") for part in textwrap.wrap(line, 94) or [""]]
    return [mark + lines[0], *(" " * len(mark) + line for line in lines[1:])]
