"""Verbs: a verb is a command that does the work of one stage, from file to file.

A verb names its inputs as options. The options that are settings follow from the fields of the settings, so that a verb and a
recipe have the same default. The command line makes a command of each verb; `runs/call.py` does for a verb what `runs/run.py` does
for a stage.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic.fields import FieldInfo

from solon.publishing import Identity
from solon.settings import DEFAULT_SYSTEM, Settings
from solon.training.settings import Progress

if TYPE_CHECKING:
    from solon.runs.call import Call

S = TypeVar("S", bound=Settings)
REQUIRED: Any = ...


@dataclass(frozen=True)
class Option:
    """One option of a verb."""

    name: str  # as a Python name; on the command line it is --kebab-case
    kind: Any  # str, int, float, bool, Path, tuple[float, float], list[str], or one of them or None
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    environment: str | None = None  # the environment variable that also gives the value
    flag: str = ""  # the option on the command line, where it differs from the name


MODEL_HELP = (
    "smollm2, a directory, a .gguf file, a hub id, or server:MODEL@http://host:port/v1; "
    "for a judge also decision:DIR_OR_ID or systemone:MODEL@http://host:port/v1."
)
TRAINED_HELP = "The model to train: smollm2, a directory, a .gguf file or a hub id."
OUT = Option("out", Path, REQUIRED, "The file or directory that the result is written to.")
MODEL = Option("model", str, "smollm2", MODEL_HELP, environment="SOLON_MODEL")
TRAINED_MODEL = Option("model", str, "smollm2", TRAINED_HELP, environment="SOLON_MODEL")
CONSTITUTION = Option(
    "constitution",
    str,
    "solon",
    "A built-in constitution (solon, simple, bank) or a file.",
    environment="SOLON_CONSTITUTION",
)
MAX_CONNECTIONS = Option(
    "max_connections", int | None, None, "Requests to a server at once; 8 where none is given.", 1, 1000,
    "SOLON_MAX_CONNECTIONS",
)  # fmt: skip
REWARD_MODEL = Option("reward_model", str, REQUIRED, "The directory of a reward model that Solon wrote.")
PRINCIPLES = Option(
    "principles", int | None, None, "Principles per pair, drawn by the seed; where none is given, all of them.", 1
)
SYSTEM = Option("system", str, DEFAULT_SYSTEM, 'The system message every chat starts with; "" sends none.')
DTYPE = Option(
    "dtype",
    str,
    "auto",
    "auto, float32 or bfloat16; auto takes bfloat16 on a GPU that has it, and the faster one on a CPU.",
)
LIMIT = Option("limit", int | None, None, "Use only this many records, from the first one.", 1)
RESTART = Option(
    "restart", bool, False, "Begin anew where --out holds an output that Solon made from other settings or inputs."
)
REPORT_TO = Option("report_to", list[str] | None, None, "Trackers beside TensorBoard: wandb, trackio, mlflow …")
SEED = Option(
    "seed", int | None, None, "Seed of all random choices; 0 where none is given.", 0, 2**32 - 1, "SOLON_SEED"
)
QUIET = Option("quiet", bool, False, "Show no progress on stderr.", environment="SOLON_QUIET")
JSON = Option("json_", bool, False, "Print the result as one line of JSON, the last line of stdout.", flag="--json")
SET = Option("set_", list[str] | None, None, "Any other setting, as KEY=VALUE; repeatable.", flag="--set")
FULL = Option("full", bool, False, "Train all weights instead of LoRA adapters.")
TO_FILE = (SYSTEM, DTYPE, LIMIT, RESTART, SEED, QUIET, JSON)
TO_TERMINAL = (SYSTEM, DTYPE, LIMIT, SEED, QUIET, JSON)
TO_MODEL = (REPORT_TO, *TO_FILE)


def setting_options(
    kinds: Sequence[type[Settings]], hidden: Iterable[str] = (), given: Settings | None = None
) -> list[Option]:
    """An option for each field of these settings and of the settings inside them. given: settings with the defaults."""
    options: list[Option] = []
    for kind in kinds:
        for name, info in kind.model_fields.items():
            inner, default = info.annotation, _default(info, name, given)
            if isinstance(inner, type) and issubclass(inner, Settings):
                options += setting_options([inner], hidden, default)
            elif name not in hidden and (plain := _option_type(inner)) is not None:
                about = (info.description or "").replace("; null:", "; where none is given:")
                options.append(Option(name, plain, default, about, _limit(info, "ge"), _limit(info, "le")))
    return options


def _default(info: FieldInfo, name: str, given: Settings | None) -> Any:
    return info.get_default(call_default_factory=True) if given is None else getattr(given, name)


def _option_type(annotation: Any) -> Any:
    """The type of an option for a field's type; None where a command line cannot give such a value."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _option_type(inner[0])
    if origin is Literal:
        return str
    if origin in (typing.Union, UnionType) and len(inner) == 2 and inner[1] is type(None):
        plain = _option_type(inner[0])
        return None if plain is None else plain | None
    if inner == (int, float):
        return float
    return annotation if annotation in (int, float, bool, str, tuple[float, float]) else None


def _limit(info: FieldInfo, name: str) -> float | None:
    """The inclusive limit `ge` or `le` of a field. An exclusive limit is checked when the settings are made."""
    return next((float(getattr(limit, name)) for limit in info.metadata if hasattr(limit, name)), None)


def make_settings(kind: type[S], options: dict[str, Any], given: Settings | None = None) -> S:
    """Settings of this kind from options named like the fields, also for the settings inside. given: the defaults."""
    values: dict[str, Any] = {}
    for name, info in kind.model_fields.items():
        inner, default = info.annotation, _default(info, name, given)
        if isinstance(inner, type) and issubclass(inner, Settings):
            values[name] = make_settings(inner, options, default)
        else:
            values[name] = options.get(name, default)
    return kind.model_validate(values)


@dataclass(frozen=True)
class Training:
    """A training outside a run, as `Call.training` takes it."""

    made_from: Identity  # the data; `Call.training` adds the start model, the settings and the seed
    train: Callable[[Path, str, Progress], dict[str, Any]]  # writes a model into this directory, in this dtype
    measure: Callable[[Path, str], dict[str, Any]] | None = None  # measures it on held-out data, for the key `heldout`
    left_out: dict[str, int] = field(default_factory=dict)  # by reason, the examples left out before the training


class Verb(ABC):
    """A command. Its docstring is its help."""

    name: ClassVar[str]
    takes: ClassVar[tuple[Option, ...]] = ()  # the inputs, and settings under other names
    settings: ClassVar[tuple[type[Settings], ...]] = ()  # every field of these is an option too
    hidden: ClassVar[tuple[str, ...]] = ()  # fields of the settings that are no options
    common: ClassVar[tuple[Option, ...]] = TO_FILE
    trains: ClassVar[bool] = False  # the verb trains --model, so the model must be in this process
    processes: ClassVar[bool] = False  # several processes may run the verb: accelerate launch

    @classmethod
    def options(cls) -> list[Option]:
        hidden = [*cls.hidden, *(option.name for option in cls.takes)]
        return [*cls.takes, *setting_options(cls.settings, hidden), *cls.common]

    @abstractmethod
    def run(self, call: Call) -> None:
        """Do the work of the verb."""
