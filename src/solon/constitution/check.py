"""The `check` of a principle that needs no model: its kinds, and the rules for a well-formed check.

A check is for properties that can be counted or matched in a response: length, words, repetitions. This file only reads
checks; `solon.feedback.checks` applies them to responses.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

LONGEST_PATTERN = 1000  # characters
MOST_REPEATS = 100_000  # the product of all counts in a pattern, which the compiler writes out
_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_RECURSION = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # YAML gives 5.0 as a float


Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1, le=1_000_000)]  # a larger count is a mistake
# Adding 0.0 makes -0.0 the 0.0 that it equals, so that equal checks have equal fingerprints.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(lambda x: x + 0.0)]


class _Check(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def parameters(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, by name, `kind` first."""
        return {"kind": type(self).model_fields["kind"].default, **self.model_dump(exclude_defaults=True)}


class Pattern(_Check):
    """A regular expression (of the `regex` package) that must be found in the response, or must not."""

    kind: Literal["pattern"] = "pattern"
    pattern: str = Field(min_length=1, description="a regular expression, in quotes")
    forbid: bool = Field(default=False, strict=True, description="true or false")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        """`solon.feedback.checks` bounds the time of a search; a pattern that cannot be bounded there is refused here."""
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
                f"is not a regular expression: {e}; correct it, and put a \\ before a sign that is meant literally"
            ) from None
        return pattern


class Length(_Check):
    """Bounds on the length, each included. A run of white space counts as one character."""

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
    """The share of n-grams of words that repeat an earlier one (`measures.texts.repetition`) is at most max."""

    kind: Literal["repetition"] = "repetition"
    max: Annotated[Number, Field(ge=0, lt=1)] = Field(description="a share from 0 to below 1")
    ngram: Count = Field(default=4, description="a whole number from 1 to a million")  # words


class Entry(_Check):
    """A Python function of (prompt: Chat, response: str). It returns a bool, or a float in 0..1 (1: fully kept).

    function: `module:function`, which runs only where the user allows it, or the name of an entry point in the group
    `solon.checks` of an installed package.
    """

    kind: Literal["entry"] = "entry"
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$|^[A-Za-z][\w.-]*$",
        description="module:function, or the name of an installed check",
    )


Check = Pattern | Length | Readability | Repetition | Entry
KINDS: dict[str, type[_Check]] = {
    kind.model_fields["kind"].default: kind for kind in (Pattern, Length, Readability, Repetition, Entry)
}


def _bounds(check: _Check, *pairs: tuple[str, str]) -> None:
    names = [name for pair in pairs for name in pair]
    given = {name: value for name in names if (value := getattr(check, name)) is not None}
    if not given:
        raise _wrong(f"has no bound; add {', '.join(names[:-1])} or {names[-1]}")
    for low, high in pairs:
        if low in given and high in given and given[low] > given[high]:
            raise _wrong(f"has a {low} above its {high}, so no response can keep both; correct one")


def _wrong(why: str) -> PydanticCustomError:
    return PydanticCustomError("check", "{why}", {"why": why})
