"""A principle that can be verified: what its `check` says, and which checks are well formed.

These are the rules of the file alone; `solon.feedback.checks` answers them. A check is for what can be counted or
matched in a response (its length, its words, its repetitions) and needs no model to judge it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

LONGEST_PATTERN = 1000  # characters
MOST_REPEATS = 100_000  # the product of all counts in a pattern, which compiling writes out: 0.05 s, a few MiB
_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_RECURSION = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # YAML's numbers come as floats


Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1, le=1_000_000)]  # more is a slip
# Adding 0.0 makes -0.0 the 0.0 that it equals, so that equal checks have equal fingerprints.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(lambda x: x + 0.0)]


class _Check(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def parameters(self) -> dict[str, Any]:
        """All that differs from its default, by name, `kind` first."""
        return {"kind": type(self).model_fields["kind"].default, **self.model_dump(exclude_defaults=True)}


class Pattern(_Check):
    """A regular expression (of the `regex` package) that must be found in the response, or must not."""

    kind: Literal["pattern"] = "pattern"
    pattern: str = Field(min_length=1, description="a regular expression, in quotes")
    forbid: bool = Field(default=False, strict=True, description="true or false")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        """Searching is bounded in time (`solon.feedback.checks`); what cannot be bounded there is refused here."""
        counts = 1
        for low, high in _COUNT.findall(pattern):
            counts *= max(int(high[:9] or 1), int(low[:9] or 1), 1)
        if len(pattern) > LONGEST_PATTERN:
            raise _wrong(f"is longer than {LONGEST_PATTERN} characters; write a shorter one")
        if counts > MOST_REPEATS:
            raise _wrong(f"has counts that multiply to more than {MOST_REPEATS}; use smaller ones, or * and +")
        if _RECURSION.search(pattern):
            raise _wrong("calls itself, which has no bound in memory; write it without (?R), (?1) or (?&name)")
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, ValueError) as e:
            raise _wrong(
                f"is not a regular expression: {e}; correct it, and put a \\ before a sign meant as such"
            ) from None
        return pattern


class Length(_Check):
    """Bounds, each included. A run of white space is one character."""

    kind: Literal["length"] = "length"
    min_words: Count | None = Field(default=None, description="a whole number from 1 to a million")
    max_words: Count | None = Field(default=None, description="a whole number from 1 to a million")
    min_characters: Count | None = Field(default=None, description="a whole number from 1 to a million")
    max_characters: Count | None = Field(default=None, description="a whole number from 1 to a million")

    @model_validator(mode="after")
    def _bounded(self) -> Length:
        _bounds(self, ("min_words", "max_words"), ("min_characters", "max_characters"))
        return self


class Readability(_Check):
    """Bounds on a published formula for English, each included.

    flesch-reading-ease: Flesch 1948; most text lies in 0..100, and higher is easier.
    flesch-kincaid-grade: Kincaid et al. 1975; years of school in the USA, and lower is easier.
    """

    kind: Literal["readability"] = "readability"
    formula: Literal["flesch-reading-ease", "flesch-kincaid-grade"] = Field(
        description="flesch-reading-ease or flesch-kincaid-grade"
    )
    min: Number | None = Field(default=None, description="a finite number")
    max: Number | None = Field(default=None, description="a finite number")

    @model_validator(mode="after")
    def _bounded(self) -> Readability:
        _bounds(self, ("min", "max"))
        return self


class Repetition(_Check):
    """The share of n-grams of words that repeat an earlier one (`metrics.repetition`) is at most max."""

    kind: Literal["repetition"] = "repetition"
    max: Annotated[Number, Field(ge=0, lt=1)] = Field(description="a share from 0 to below 1")
    ngram: Count = Field(default=4, description="a whole number from 1 to a million")  # words


class Entry(_Check):
    """A Python function, called with (prompt: Chat, response: str): bool, or float in 0..1 for how well it is kept.

    `module:function`, which runs only where the user allows it, or the name of an entry point in the group
    `solon.checks` of an installed package.
    """

    kind: Literal["entry"] = "entry"
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$|^[A-Za-z][\w.-]*$",
        description="module:function, or the name of an installed check",
    )


Check = Pattern | Length | Readability | Repetition | Entry
KINDS: dict[str, type[_Check]] = {
    "pattern": Pattern,
    "length": Length,
    "readability": Readability,
    "repetition": Repetition,
    "entry": Entry,
}


def _bounds(check: _Check, *pairs: tuple[str, str]) -> None:
    names = [name for pair in pairs for name in pair]
    given = {name: value for name in names if (value := getattr(check, name)) is not None}
    if not given:
        raise _wrong(f"has no bound; add {', '.join(names[:-1])} or {names[-1]}")
    for low, high in pairs:
        if low in given and high in given and given[low] > given[high]:
            raise _wrong(f"has a {low} above its {high}, which nothing keeps; correct one")


def _wrong(why: str) -> PydanticCustomError:
    return PydanticCustomError("check", "{why}", {"why": why})
