"""The keys of a recipe that belong to no single stage (the model, the seed, the data), and reading and writing a recipe."""

from __future__ import annotations

import io
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
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

    Where a recipe names no held-out prompts, a shipped set brings its held-out prompts with it. Of a user's file a share of the
    prompts is drawn by the seed and kept out of training.
    """

    red_team: str = "solon:red-team"
    """Prompts that ask for something harmful: a JSON Lines file, or a shipped set such as solon:red-team."""
    helpful: str = "solon:helpful"
    """Prompts that ask for something harmless: a JSON Lines file, or a shipped set such as solon:helpful."""
    heldout_red_team: str | None = None
    """Red-team prompts that the models are measured on and never trained on; null: those of the shipped set, or `heldout_share`."""
    heldout_helpful: str | None = None
    """Helpful prompts that the models are measured on and never trained on; null: those of the shipped set, or `heldout_share`."""
    heldout_share: float = Field(0.2, gt=0, le=0.5)
    """Share of the distinct prompts of your own file that is kept out of training, where no held-out file is named."""
    n_red_team: int | None = Field(None, ge=0)
    """Number of red-team prompts to train on, drawn by the seed; null: all; 0: none. With 0, none is held out unless a
    held-out file is named."""
    n_helpful: int | None = Field(None, ge=0)
    """Number of helpful prompts to train on, drawn by the seed; null: all; 0: none. With 0, none is held out unless a
    held-out file is named."""
    rl_red_team: int = Field(0, ge=0)
    """Number of further red-team prompts, drawn after `n_red_team`, for the reinforcement stage alone; where the file holds fewer, all
    that are left. The supervised stage has taught the model when to decline the other prompts. On further ones the model is as unsure
    as on the prompts of its users (Bai et al. 2022, section 4.2, add prompts too)."""
    rl_helpful: int = Field(0, ge=0)
    """Number of further helpful prompts, drawn after `n_helpful`, for the reinforcement stage alone."""
    n_heldout: int | None = Field(None, ge=1)
    """Number of held-out prompts of each kind (red-team, helpful); null: all."""

    @model_validator(mode="after")
    def _leave_some_for_reinforcement(self) -> Self:
        for name, n, further in (
            ("red_team", self.n_red_team, self.rl_red_team),
            ("helpful", self.n_helpful, self.rl_helpful),
        ):
            if n is None and further:
                raise ValueError(f"rl_{name}: no prompt is left where n_{name} is null (all); set n_{name} to a number")
        return self


class Human(Settings):
    """Data from people: demonstrations and labelled comparisons. The shipped sets are examples for your own data."""

    demonstrations: tuple[str, ...] = ()
    """Files of conversations in which a person wrote the answers; shipped sets may be named too."""
    revision_demonstrations: str | None = None
    """A file of revision chains in which a person wrote the critiques and the revisions; null: none."""
    comparisons: tuple[str, ...] = ()
    """Files of comparisons in which a person chose the better of two responses."""
    heldout_comparisons: int = Field(60, ge=0)
    """Number of comparisons that are kept out of all training, to measure the judge and the reward model; 0: none."""
    heldout_from: str | None = None
    """A file of comparisons to hold out, or a shipped set; null: the held-out comparisons are some of `comparisons`."""
    n_demonstrations: int | None = Field(None, ge=1)
    """Number of demonstrations to use, drawn by the seed; null: all."""
    n_revision_demonstrations: int | None = Field(None, ge=1)
    """Number of revision demonstrations to use, drawn by the seed; null: as many as `n_demonstrations`."""
    n_comparisons: int | None = Field(None, ge=2)
    """Number of comparisons to use, the held-out ones included; null: all."""
    validation_sample: int = Field(0, ge=0)
    """Number of the judge's comparisons that are drawn into `validation/sample.jsonl` for people to check; 0: none."""


class Common(Settings):
    """The keys of every recipe. `recipes/recipe.py` adds a key for the settings of each stage."""

    sections: ClassVar[Mapping[type[Settings], str]] = {}
    """The key of the section that holds settings of each kind."""

    name: str
    """Name of the recipe, for messages and the report."""
    description: str = ""
    """One sentence about the recipe."""
    seed: SeedNumber = 0
    """Seed of all random choices: the data's order, principles, sampling and training."""
    model: str = "smollm2"
    """The model that the run starts from: smollm2, a directory, a .gguf file or a hub id."""
    constitution: str = "solon"
    """A built-in constitution (solon, simple, bank) or a YAML file."""
    system: str | None = DEFAULT_SYSTEM
    """The system message at the start of every conversation; null: no system message."""
    dtype: Dtype = "auto"
    """Number format of models that generate or judge; auto: bfloat16 on a GPU that has it; on a CPU the faster one, measured
    once."""
    training_dtype: Dtype | None = None
    """Number format of models in training; null: the same as `dtype`."""
    batch_size: int = Field(64, ge=1)
    """Number of prompts in one batch of generation and judging. A killed run computes at most one batch again."""
    adapter: AdapterSettings | None = AdapterSettings()
    """LoRA adapters of every training whose section names none. Every reinforcement algorithm needs them, so null is an error."""
    prompts: Prompts = Prompts()
    """The prompts that the models are trained on, and the prompts that they are measured on."""
    human: Human = Human()
    """Data from people: demonstrations and labelled comparisons."""
    algorithm: str = "ppo"
    """The reinforcement algorithm: ppo, or TRL's rloo, grpo or dpo. The section of the same name holds its settings."""
    report_to: tuple[str, ...] = ()
    """Trackers of training curves beside TensorBoard: wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive, swanlab."""

    @property
    def learning_dtype(self) -> str:
        """The dtype of models in training."""
        return self.training_dtype or self.dtype

    def find(self, kind: type[S]) -> S | None:
        """The section of the recipe that holds settings of this kind; None where the recipe leaves it out."""
        name = self.sections.get(kind)
        return None if name is None else getattr(self, name)

    def of(self, kind: type[S]) -> S:
        """The section of the recipe that holds settings of this kind. Raises LookupError where the recipe has none."""
        section = self.find(kind)
        if section is None:
            raise LookupError(f"the recipe has no {kind.__name__}")
        return section


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
        place, key = _place(source, first["loc"], overrides or {}), printable(".".join(map(str, first["loc"])), 120)
        raise InputError(f"{place}: {_message(kind, first, '' if place == f'--set {key}' else key)}") from error


def dump_recipe(recipe: Common) -> str:
    """A file that loads back to an equal recipe."""
    stream = io.StringIO()
    YAML(pure=True).dump(_writable(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def _writable(node: Any) -> Any:
    """The node for the YAML writer: a text with line breaks or control characters goes into double quotes, escaped."""
    if isinstance(node, dict):
        return {k: _writable(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_writable(v) for v in node]
    return DoubleQuotedScalarString(node) if isinstance(node, str) and not node.isprintable() else node


def _message(recipe: type[BaseModel], error: Any, key: str) -> str:
    """The message for one of pydantic's errors. key: the dotted key; empty where the message's beginning already names it."""
    if error["type"] == "extra_forbidden":
        unknown = quoted(".".join(map(str, error["loc"])))
        return f"unknown key {unknown}{nearest(str(error['loc'][-1]), _keys(recipe, error['loc'][:-1]))}"
    message = printable(error["msg"].removeprefix("Value error, "))
    if error["type"] == "string_type":
        message = f"expected a text; put quotes around {quoted(str(error['input']))[1:-1]}"
    elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"expected keys with values; the keys here are {', '.join(_keys(recipe, error['loc']))}"
    elif error["type"] == "tuple_type":
        message = "expected a list, such as [a, b]"
    return f"{key + ': ' if key else ''}{message[:1].lower() + message[1:]}"


def _place(source: YamlText, loc: Where, overrides: dict[str, Any]) -> str:
    """The place of an error: the override that set the key, or file and line of the deepest part of `loc` in the file."""
    dotted = ".".join(map(str, loc))
    for key in overrides:
        if f"{dotted}.".startswith(f"{key}.") or (key.startswith(f"{dotted}.") and loc not in source.places):
            return f"--set {key}"
    return f"{source.file}:{source.line(source.place(loc).key)}"


def _keys(recipe: type[BaseModel], loc: Where) -> list[str]:
    """The keys that the section at `loc` may have."""
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
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value
