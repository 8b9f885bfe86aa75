"""A recipe: everything a run is made of, in one typed file.

RLHF, RLAIF, Constitutional AI and the hybrid are recipes of one pipeline. A part that is left out is a stage that
is skipped. Defaults stand here, each with its unit; an unknown key is an error that names the nearest right one.
"""

from __future__ import annotations

import io
import typing
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, Field, ValidationError, create_model, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from solon.errors import InputError, nearest, printable, quoted
from solon.runs.trackers import check_trackers
from solon.settings import Settings
from solon.stages import all_stages
from solon.stages.common import Common
from solon.stages.reinforcement import Reinforcement
from solon.yaml_text import Where, YamlText, read_bytes


class RecipeBase(Common):
    """What a recipe can do beside holding its settings."""

    def models(self) -> dict[str, str]:
        """Every model that the recipe names, by its key."""
        named = {"model": self.model}
        for stage in all_stages():
            named |= stage.models(self)
        return named

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = [s.name for s in all_stages() if isinstance(s, Reinforcement)]
        if self.algorithm not in known:
            raise ValueError(
                f"algorithm: {quoted(self.algorithm)}: the algorithms are {', '.join(sorted(known))}"
                f"{nearest(self.algorithm, known)}"
            )
        for stage in all_stages():
            if stage.settings is None or self.find(stage.settings) is not None:
                stage.check(self)
        try:
            check_trackers(self.report_to)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self


def _parts() -> dict[str, Any]:
    """A field for each part that stages have in a recipe; several stages may share one."""
    kinds: dict[str, list[type[Settings]]] = {}
    optional: dict[str, bool] = {}
    for stage in all_stages():
        if stage.part and stage.settings is not None:
            kinds.setdefault(stage.part, []).append(stage.settings)
            optional[stage.part] = optional.get(stage.part, True) and stage.optional
    fields: dict[str, Any] = {}
    for part, settings in kinds.items():
        kind = settings[0] if len(settings) == 1 else create_model(part, __base__=tuple(settings))
        about = " ".join(dict.fromkeys((s.__doc__ or "").split("\n")[0] for s in settings))
        if optional[part]:
            fields[part] = (kind | None, Field(None, description=about))
        else:
            fields[part] = (kind, Field(kind(), description=about))
    return fields


if TYPE_CHECKING:
    Recipe = RecipeBase
else:
    Recipe = create_model("Recipe", __base__=RecipeBase, __module__=__name__, **_parts())


def builtin_recipes() -> dict[str, Path]:
    folder = Path(str(files("solon"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or a file. overrides: dotted keys to values, which win over the file's.

    Raises InputError: one line that begins with FILE:LINE, or with the override that is wrong.
    """
    path = builtin_recipes().get(name) or Path(name).expanduser()
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        known = list(builtin_recipes())
        names = ", ".join(known)
        raise InputError(f"no recipe and no file is named {quoted(name)}; the recipes are {names}{nearest(name, known)}") from None  # fmt: skip
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {quoted(name)}: {why}; give a recipe's file or name") from None
    source = YamlText.of_bytes(data, str(path), what="recipe", a_few="keys", expected="keys such as name: and model:")
    values = source.read()
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        at, where = _at(source, first["loc"], overrides or {}), printable(".".join(map(str, first["loc"])), 120)
        raise InputError(f"{at}: {_wrong(first, '' if at == f'--set {where}' else where)}") from error


def _wrong(error: Any, where: str) -> str:
    """What is wrong with a recipe, for one of pydantic's errors. where: the key, unless it has been said."""
    if error["type"] == "extra_forbidden":
        key = ".".join(str(x) for x in error["loc"])
        return f"unknown key {quoted(key)}{nearest(str(error['loc'][-1]), _keys(error['loc'][:-1]))}"
    message = printable(error["msg"].removeprefix("Value error, "))
    if error["type"] == "string_type":
        message = f"expected a text; put quotes around {quoted(str(error['input']))[1:-1]}"
    elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"expected keys with values; the keys here are {', '.join(_keys(error['loc']))}"
    elif error["type"] == "tuple_type":
        message = "expected a list, such as [a, b]"
    return f"{where + ': ' if where else ''}{message[:1].lower() + message[1:]}"


def _at(source: YamlText, loc: Where, overrides: dict[str, Any]) -> str:
    """The place of an error: the override that set it, or file and line of the deepest part of `loc` in the file."""
    dotted = ".".join(str(x) for x in loc)
    for key in overrides:
        if f"{dotted}.".startswith(f"{key}.") or (key.startswith(f"{dotted}.") and loc not in source.places):
            return f"--set {key}"
    return f"{source.file}:{source.line(source.place(loc).key)}"


def dump_recipe(recipe: Recipe) -> str:
    """A file that loads back to an equal recipe."""
    stream = io.StringIO()
    YAML(pure=True).dump(_writable(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def _writable(node: Any) -> Any:
    """The same for the YAML writer: a text with line breaks or control characters goes into double quotes, escaped."""
    if isinstance(node, dict):
        return {k: _writable(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_writable(v) for v in node]
    return DoubleQuotedScalarString(node) if isinstance(node, str) and not node.isprintable() else node


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    kind: Any = Recipe
    for key in loc:
        field = kind.model_fields.get(key) if hasattr(kind, "model_fields") else None
        if field is None:
            return []
        options = [field.annotation, *typing.get_args(field.annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(kind.model_fields) if kind else []
