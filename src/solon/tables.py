"""The cells of the report (numbers, estimates, times and texts as plain strings) and the tables that hold them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from solon.errors import printable

MISSING = "not measured"
# decimals by unit; 3 for any other unit
DIGITS = {"%": 1, "points": 1, "points above 50 %": 1, "words": 1, "sd": 2, "nats per response": 2}


@dataclass(frozen=True)
class Section:
    """A titled table of plain strings. Without rows, the report says that the part was not measured."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    points: tuple[str, ...] = ()  # sentences before the table
    plot: str = ""  # an <svg> element made of numbers only, shown in HTML only: the table has the same numbers
    level: int = 2  # the title's level; 3: part of the section before
    first: bool = False  # comes before the sections of the other stages


def number(value: Any, digits: int | None = None) -> str:
    """A number for a person, or "not measured". digits: decimals; None gives three significant figures."""
    if value is None:
        return MISSING
    if not isinstance(value, (int, float)):
        return clean(str(value))
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if isinstance(value, int):
        return f"{value:,}"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def estimate(measured: dict[str, Any] | None, unit: str = "", scale: float = 1.0, sign: bool = False) -> str:
    """`12.5 % [8.1, 17.3], n = 48`; without a value, "not measured". scale: 100 for a share in %. sign: `+12.5`."""
    if not measured or measured.get("value") is None:
        n = (measured or {}).get("n")
        return MISSING if n is None else f"{MISSING}, n = {number(n)}"
    digits = DIGITS.get(unit, 3)
    value, low, high = (
        None if measured.get(k) is None else scale * float(measured[k]) for k in ("value", "low", "high")
    )
    interval = "no interval" if low is None or high is None else f"{number(low, digits)}, {number(high, digits)}"
    n = measured.get("n")
    plus = "+" if sign and value is not None and value > 0 else ""
    return f"{plus}{number(value, digits)}{f' {clean(unit)}' if unit else ''} [{interval}], n = {number(n)}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `12 min 5 s`, `1 h 02 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def money(usd: float | None) -> str:
    """US dollars, to the cent, or to four figures below one."""
    if usd is None:
        return MISSING
    return f"${usd:,.2f}" if usd == 0 or abs(usd) >= 1 else f"${usd:.4f}"


# Control characters and the marks that reorder text (Unicode Bidi_Control); newline and tab stay.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Text without control characters, each shown as U+FFFD, so that no terminal or browser acts on one."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n"))


def text(value: Any) -> str:
    return MISSING if value is None or value == "" else clean(str(value))


def at(data: Any, path: str) -> Any:
    """The value at a path such as `position.bias`; None where there is none."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def source(row: dict[str, Any]) -> str:
    return text(row.get("source")).replace("red_team", "red-team")


SHOWN = 5  # reasons; a server may give a different text for every failure


def counted(reasons: Mapping[str, int]) -> str:
    """`2 empty revision, 1 too long`: the commonest first."""
    ordered = sorted(reasons.items(), key=lambda x: (-x[1], x[0]))
    more = f", {number(sum(n for _, n in ordered[SHOWN:]))} for other reasons" if len(ordered) > SHOWN else ""
    return ", ".join(f"{number(n)} {printable(clean(why), 120)}" for why, n in ordered[:SHOWN]) + more
