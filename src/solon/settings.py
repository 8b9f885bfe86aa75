"""The base of everything that is set by a recipe or an option: typed, frozen, unknown keys refused, numbers finite.

pydantic would take true for 1 and "3" for 3; here a slip of that kind is an error, since it is more often one.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LearningRate = Annotated[float, Field(gt=0, le=1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
SeedNumber = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other


DEFAULT_SYSTEM = "You are a helpful assistant."


class Settings(BaseModel):
    """Settings whose fields carry a docstring each: `--help` and the recipe reference are made of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_own_kind(cls, value: Any, info: ValidationInfo) -> Any:
        _fits(value, cls.model_fields[str(info.field_name)].annotation)
        return value


def _fits(value: Any, annotation: Any) -> None:
    """Raises ValueError where a number, a text or a truth value stands for one of the others."""
    if isinstance(value, list | tuple):
        for item in value:
            _fits(item, typing.Union[tuple(_items(annotation))])  # noqa: UP007 (made at run time)
        return
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("holds half of a surrogate pair; write the whole character")
    kinds = _kinds(annotation)
    if Any in kinds:
        return
    wanted = "a number" if kinds & {int, float} else "true or false" if bool in kinds else ""
    if isinstance(value, bool) and bool not in kinds and wanted:
        raise ValueError(f"{str(value).lower()} is no number; expected {wanted}")
    if isinstance(value, str) and str not in kinds and wanted:
        raise ValueError(f'"{value[:40]}" is a text; expected {wanted}, without quotes')
    if isinstance(value, int | float) and not isinstance(value, bool) and wanted == "true or false":
        raise ValueError(f"{value!r:.40} is a number; expected {wanted}")


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows for one value; str for a Literal of words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {type(value) for value in inner}
    if origin in (tuple, list, dict):
        return {origin}
    if origin is Annotated:
        return _kinds(inner[0])
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def _items(annotation: Any) -> list[Any]:
    """What the items of a list may be, for an annotation that allows one; otherwise anything."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (tuple, list):
        return [x for x in inner if x is not ...]
    found = [x for part in inner if typing.get_args(part) for x in _items(part)] if origin else []
    return found or [Any]
