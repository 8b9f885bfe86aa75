"""The keys of a recipe that belong to no single stage: the model, the seed, the data."""

from __future__ import annotations

import io
import typing
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from solon.errors import InputError, nearest, printable, quoted
from solon.models.settings import AdapterSettings
from solon.settings import DEFAULT_SYSTEM, SeedNumber, Settings
from solon.yaml_text import Where, YamlText

S = TypeVar("S", bound=Settings)
C = TypeVar("C", bound="Common")
Dtype = Literal["auto", "float32", "bfloat16"]


class Prompts(Settings):
    """Prompt files, or shipped sets (`solon:…`).

    Where the held-out prompts are not named, they are those that ship with a shipped set; of a file of yours, a share of
    its prompts is drawn by the seed and kept out of training.
    """

    red_team: str = "solon:red-team"
    """Prompts that ask for something harmful."""
    helpful: str = "solon:helpful"
    """Prompts that ask for something harmless."""
    heldout_red_team: str | None = None
    """Red-team prompts that the models are measured on."""
    heldout_helpful: str | None = None
    """Helpful prompts that the models are measured on."""
    heldout_share: float = Field(0.2, gt=0, le=0.5)
    """Share of the different prompts of a file of yours that is held out, where no held-out file is named."""
    n_red_team: int | None = Field(None, ge=0)
    """How many of the red-team prompts to train on, from the front of an order drawn by the seed; null: all."""
    n_helpful: int | None = Field(None, ge=0)
    """The same for helpful prompts."""
    n_heldout: int | None = Field(None, ge=1)
    """How many held-out prompts of each kind; null: all."""


class Human(Settings):
    """What people wrote and chose. The shipped sets stand where a user's own data goes."""

    demonstrations: tuple[str, ...] = ()
    """Files of conversations in which people show how to answer."""
    revision_demonstrations: str | None = None
    """A file of revision chains in which people show how to criticise and revise."""
    comparisons: tuple[str, ...] = ()
    """Files of comparisons that people labelled."""
    heldout_comparisons: int = Field(60, ge=0)
    """How many comparisons are kept out of all training, to measure the judge and the reward model on."""
    n_demonstrations: int | None = Field(None, ge=1)
    """How many demonstrations (and as many revision demonstrations) to use; null: all."""
    n_comparisons: int | None = Field(None, ge=2)
    """How many comparisons to use; null: all."""
    validation_sample: int = Field(0, ge=0)
    """How many of the AI's comparisons are drawn for people to check."""


class Common(Settings):
    """The keys of every recipe. `runs/recipe.py` adds one for each stage's settings."""

    name: str
    """What the recipe is called."""
    description: str = ""
    """What the recipe does, in a sentence."""
    seed: SeedNumber = 0
    """Seed of everything random."""
    model: str = "smollm2"
    """The model to start from: smollm2, a directory, a .gguf file or a hub id."""
    constitution: str = "solon"
    """A built-in constitution (solon, simple, bank) or a file."""
    system: str | None = DEFAULT_SYSTEM
    """The system message of every conversation; null sends none."""
    dtype: Dtype = "auto"
    """Dtype of models that generate or judge; auto takes the one that is faster on this machine."""
    training_dtype: Dtype | None = None
    """Dtype of models that learn; null: as `dtype`."""
    batch_size: int = Field(64, ge=1)
    """Prompts that are worked on together. A killed run computes at most one such batch again."""
    adapter: AdapterSettings | None = AdapterSettings()
    """LoRA adapters of every training that has none of its own; null trains all weights."""
    prompts: Prompts = Prompts()
    """The prompts: those that are trained on, and those that the models are measured on."""
    human: Human = Human()
    """What people wrote and chose."""
    algorithm: str = "ppo"
    """The reinforcement algorithm: ppo, or TRL's rloo, grpo, dpo. Each has its own settings under its own name."""
    report_to: tuple[str, ...] = ()
    """Trackers beside TensorBoard: wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive, swanlab."""

    @property
    def learning_dtype(self) -> str:
        """The dtype of models that learn."""
        return self.training_dtype or self.dtype

    def find(self, kind: type[S]) -> S | None:
        """The recipe's settings of this kind; None where the recipe leaves them out."""
        return next((v for name in type(self).model_fields if isinstance(v := getattr(self, name), kind)), None)

    def of(self, kind: type[S]) -> S:
        """The recipe's settings of this kind, which it must have."""
        found = self.find(kind)
        if found is None:
            raise LookupError(f"the recipe has no {kind.__name__}")
        return found


def read_recipe(kind: type[C], data: bytes, file: str, overrides: dict[str, Any] | None = None) -> C:
    """The recipe in a file's bytes. overrides: dotted keys to values, which win over the file's.

    Raises InputError: one line that begins with FILE:LINE, or with the override that is wrong.
    """
    source = YamlText.of_bytes(data, file, what="recipe", a_few="keys", expected="keys such as name: and model:")
    values = source.read()
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        at, where = _at(source, first["loc"], overrides or {}), printable(".".join(map(str, first["loc"])), 120)
        raise InputError(f"{at}: {_wrong(kind, first, '' if at == f'--set {where}' else where)}") from error


def dump_recipe(recipe: Common) -> str:
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


def _wrong(recipe: type[BaseModel], error: Any, where: str) -> str:
    """What is wrong with a recipe, for one of pydantic's errors. where: the key, unless it has been said."""
    if error["type"] == "extra_forbidden":
        key = ".".join(str(x) for x in error["loc"])
        return f"unknown key {quoted(key)}{nearest(str(error['loc'][-1]), _keys(recipe, error['loc'][:-1]))}"
    message = printable(error["msg"].removeprefix("Value error, "))
    if error["type"] == "string_type":
        message = f"expected a text; put quotes around {quoted(str(error['input']))[1:-1]}"
    elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"expected keys with values; the keys here are {', '.join(_keys(recipe, error['loc']))}"
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


def _keys(recipe: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    kind: Any = recipe
    for key in loc:
        field = kind.model_fields.get(key) if hasattr(kind, "model_fields") else None
        if field is None:
            return []
        options = [field.annotation, *typing.get_args(field.annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(kind.model_fields) if kind else []


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value
