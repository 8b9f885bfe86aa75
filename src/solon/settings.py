"""The base class of recipe sections and options: typed, frozen, without unknown keys, every number finite.

pydantic alone would take `true` for 1 and "3" for 3. Here a value of the wrong kind is an error, because it is usually a slip.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LearningRate = Annotated[float, Field(gt=0, le=1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
# Passes over a data set; below 1, over a part of it. A whole number is an integer, so that 2 and 2.0 are the same settings.
Passes = Annotated[float, Field(gt=0, le=10_000), AfterValidator(lambda n: int(n) if n == int(n) else n)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
SeedNumber = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger seed

DEFAULT_SYSTEM = "You are a helpful assistant."


class Settings(BaseModel):
    """Settings. The docstring below each field is its text in `--help` and in the recipe reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_and_complete(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        _check_kind(value, field.annotation)
        return _complete(value, field.default)


def _complete(value: Any, default: Any) -> Any:
    """A section from a recipe with the keys that it leaves out taken from the default of this section.

    Without this the section would fall back to the defaults of its class: `feedback.sampling: {max_tokens: 12}` would be sampled
    at the temperature of every `SamplingSettings`, and not at the temperature of `feedback.sampling`.
    """
    if not (isinstance(value, dict) and isinstance(default, Settings)):
        return value
    defaults = {name: getattr(default, name) for name in type(default).model_fields}
    return {**defaults, **{name: _complete(inner, defaults.get(name)) for name, inner in value.items()}}


def _check_kind(value: Any, annotation: Any) -> None:
    """Raises ValueError where a number, a text or a truth value stands for one of the other kinds."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_kind(item, typing.Union[tuple(_item_types(annotation))])  # noqa: UP007 (made at run time)
        return
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("holds half of a surrogate pair; write the whole character")
    kinds = _plain_types(annotation)
    if Any in kinds:
        return
    wanted = "a number" if kinds & {int, float} else "true or false" if bool in kinds else ""
    if isinstance(value, bool) and bool not in kinds and wanted:
        raise ValueError(f"{str(value).lower()} is no number; expected {wanted}")
    if isinstance(value, str) and str not in kinds and wanted:
        raise ValueError(f'"{value[:40]}" is a text; expected {wanted}, without quotes')
    if isinstance(value, int | float) and not isinstance(value, bool) and wanted == "true or false":
        raise ValueError(f"{value!r:.40} is a number; expected {wanted}")


def _plain_types(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows for one value; str for a Literal of words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {type(value) for value in inner}
    if origin in (tuple, list, dict):
        return {origin}
    if origin is Annotated:
        return _plain_types(inner[0])
    return set().union(*map(_plain_types, inner)) if inner else {annotation}


def _item_types(annotation: Any) -> list[Any]:
    """The types that the items of a list may have; Any where the annotation allows no list."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (tuple, list):
        return [item for item in inner if item is not ...]
    types = [item for part in inner if typing.get_args(part) for item in _item_types(part)] if origin else []
    return types or [Any]
