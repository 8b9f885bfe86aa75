"""A recipe: everything that a run is made of, in one typed file.

RLHF, RLAIF, Constitutional AI and the hybrid are recipes of one pipeline. A run skips an optional stage whose section is left out.
An unknown key is an error that names the nearest known key.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, create_model, model_validator

from solon.errors import InputError, nearest, quoted
from solon.runs.common import Common, read_recipe
from solon.runs.trackers import check_trackers
from solon.settings import Settings
from solon.stages import all_stages
from solon.stages.reinforcement import Reinforcement
from solon.yaml_text import read_bytes


class RecipeBase(Common):
    """A recipe with its methods. `Recipe` adds the sections of the stages."""

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
            names = f"{', '.join(sorted(known))}{nearest(self.algorithm, known)}"
            raise ValueError(f"algorithm: {quoted(self.algorithm)}: the algorithms are {names}")
        for stage in all_stages():
            if stage.settings is None or self.find(stage.settings) is not None:
                stage.check(self)
        try:
            check_trackers(self.report_to)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self


def _parts() -> dict[str, Any]:
    """A field for each section that stages have in a recipe; several stages may share one section."""
    kinds: dict[str, list[type[Settings]]] = {}
    optional: dict[str, bool] = {}
    for stage in all_stages():
        if stage.part and stage.settings is not None:
            kinds.setdefault(stage.part, []).append(stage.settings)
            optional[stage.part] = optional.get(stage.part, True) and stage.optional
    fields: dict[str, Any] = {}
    for part, settings in kinds.items():
        if part in RecipeBase.model_fields or hasattr(RecipeBase, part):
            raise InputError(
                f"the section {part} of a stage: a recipe has a key or a method of this name; rename the section"
            )
        kind = settings[0]
        if len(settings) > 1:  # the class has a name in this module, so that a recipe can be sent to another process
            name = f"{part.title().replace('_', '')}Part"
            kind = globals()[name] = create_model(name, __base__=tuple(settings), __module__=__name__)
        about = " ".join(dict.fromkeys((s.__doc__ or "").split("\n")[0] for s in settings))
        annotation, default = (kind | None, None) if optional[part] else (kind, kind())
        fields[part] = (annotation, Field(default, description=about))
    return fields


if TYPE_CHECKING:
    Recipe = RecipeBase
else:
    Recipe = create_model("Recipe", __base__=RecipeBase, __module__=__name__, **_parts())


def _sections() -> dict[type[Settings], str]:
    """The key of the section that holds settings of each kind, and of the kinds that they are made from.

    Solon's own stages come first, so that a package whose settings extend those of a section does not take its place.
    """
    stages = sorted(all_stages(), key=lambda s: not type(s).__module__.startswith("solon."))
    parts = [(s, s.settings, s.part) for s in stages if s.part and s.settings is not None]
    sections: dict[type[Settings], str] = {}
    for stage, kind, part in parts:
        if sections.setdefault(kind, part) != part:
            raise InputError(
                f"the stage {stage.name}: {kind.__name__} belongs to the section {sections[kind]}; make a subclass of it "
                f"for the section {part}"
            )
    for _, kind, part in parts:
        for base in kind.__mro__:
            if issubclass(base, Settings) and base is not Settings:
                sections.setdefault(base, part)
    return sections


RecipeBase.sections = _sections()


def builtin_recipes() -> dict[str, Path]:
    folder = Path(str(files("solon"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or a file. overrides: values by dotted key, in place of the file's values.

    Raises InputError: one line that begins with FILE:LINE, or with the override that is wrong.
    """
    path = builtin_recipes().get(name) or Path(name).expanduser()
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        known = list(builtin_recipes())
        advice = f"the recipes are {', '.join(known)}{nearest(name, known)}"
        raise InputError(f"no recipe and no file is named {quoted(name)}; {advice}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {quoted(name)}: {why}; give a recipe's file or name") from None
    recipe: Recipe = read_recipe(Recipe, data, str(path), overrides)
    return recipe
