"""What a verb of the command line is: a stage on its own, from file to file.

A verb names its options; those that are settings follow from the settings' own fields, so that a verb and a recipe have one
default. `cli/__init__.py` makes a command of each verb, `runs/call.py` does for it what `runs/run.py` does for a stage.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Le
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

    name: str  # as a Python name; on the command line --kebab-case
    kind: Any  # str, int, float, bool, Path, tuple[float, float], list[str], or one of them or None
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    environment: str | None = None  # a variable that gives the value
    flag: str = ""  # the option's name where it is another one


MODEL_HELP = (
    "smollm2, a directory, a .gguf file, a hub id, or server:MODEL@http://host:port/v1; "
    "for a judge also decision:DIR_OR_ID or systemone:MODEL@http://host:port/v1."
)
TRAINED_HELP = "The model to train: smollm2, a directory, a .gguf file or a hub id."
OUT = Option("out", Path, REQUIRED, "Where the result goes.")
MODEL = Option("model", str, "smollm2", MODEL_HELP, environment="SOLON_MODEL")
TRAINED_MODEL = Option("model", str, "smollm2", TRAINED_HELP, environment="SOLON_MODEL")
CONSTITUTION = Option("constitution", str, "solon", "A built-in name or a file.", environment="SOLON_CONSTITUTION")
MAX_CONNECTIONS = Option(
    "max_connections", int | None, None, "Requests to a server at once; 8 where none is given.", 1, 1000,
    "SOLON_MAX_CONNECTIONS",
)  # fmt: skip
SYSTEM = Option("system", str, DEFAULT_SYSTEM, 'The system message every chat starts with; "" sends none.')
DTYPE = Option("dtype", str, "auto", "auto, float32 or bfloat16.")
LIMIT = Option("limit", int | None, None, "Only this many records, from the first one.", 1)
RESTART = Option(
    "restart", bool, False, "Begin anew where --out holds what Solon made of other settings or inputs."
)  # fmt: skip
REPORT_TO = Option("report_to", list[str] | None, None, "Trackers beside TensorBoard: wandb, trackio, mlflow …")
SEED = Option("seed", int | None, None, "Seed of everything random.", 0, 2**32 - 1, "SOLON_SEED")
QUIET = Option("quiet", bool, False, "No progress on stderr.", environment="SOLON_QUIET")
JSON = Option("json_", bool, False, "A machine-readable last line on stdout.", flag="--json")
SET = Option("set_", list[str] | None, None, "Any other setting, as KEY=VALUE; repeatable.", flag="--set")
FULL = Option("full", bool, False, "Train all weights instead of LoRA adapters.")
TO_FILE = (SYSTEM, DTYPE, LIMIT, RESTART, SEED, QUIET, JSON)
TO_MODEL = (REPORT_TO, *TO_FILE)


def setting_options(
    kinds: Sequence[type[Settings]], hidden: Iterable[str] = (), given: Settings | None = None
) -> list[Option]:
    """An option for each field of these settings, those of settings inside them included. given: whose values are defaults."""
    found: list[Option] = []
    for kind in kinds:
        for name, info in kind.model_fields.items():
            inner, default = info.annotation, _default(info, name, given)
            if isinstance(inner, type) and issubclass(inner, Settings):
                found += setting_options([inner], hidden, default)
            elif name not in hidden and (plain := _plain(inner)) is not None:
                low, high = _bounds(info)
                about = (info.description or "").replace("; null:", "; where none is given:")
                found.append(Option(name, plain, default, about, low, high))
    return found


def _default(info: FieldInfo, name: str, given: Settings | None) -> Any:
    return info.get_default(call_default_factory=True) if given is None else getattr(given, name)


def _plain(annotation: Any) -> Any:
    """The type of an option for a field's type; None where a command line cannot give such a value."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plain(inner[0])
    if origin is Literal:
        return str
    if origin in (typing.Union, UnionType) and len(inner) == 2 and inner[1] is type(None):
        plain = _plain(inner[0])
        return None if plain is None else plain | None
    return annotation if annotation in (int, float, bool, str, tuple[float, float]) else None


def _bounds(info: FieldInfo) -> tuple[float | None, float | None]:
    low = next((m.ge for m in info.metadata if isinstance(m, Ge)), None)
    if low is None and any(isinstance(m, Gt) for m in info.metadata):
        low = None  # an open bound is said when the settings are made
    high = next((m.le for m in info.metadata if isinstance(m, Le)), None)
    return (None if low is None else float(str(low))), (None if high is None else float(str(high)))


def make_settings(kind: type[S], options: dict[str, Any], given: Settings | None = None) -> S:
    """Settings of this kind out of options, by the names of the fields; those inside them likewise."""
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
    """A training on its own, as `Call.training` takes it."""

    made_from: Identity  # what the model is made from beside the model it starts from, the settings and the seed
    train: Callable[[Path, str, Progress], dict[str, Any]]  # into this directory, in this dtype
    measure: Callable[[Path, str], dict[str, Any]] | None = None  # on what was held out; kept as `heldout`
    left_out: dict[str, int] = field(default_factory=dict)  # by reason, before the training


class Verb(ABC):
    """A command. Its docstring is its help."""

    name: ClassVar[str]
    takes: ClassVar[tuple[Option, ...]] = ()  # its inputs, and settings under other names
    settings: ClassVar[tuple[type[Settings], ...]] = ()
    hidden: ClassVar[tuple[str, ...]] = ()  # fields of the settings that are no options
    common: ClassVar[tuple[Option, ...]] = TO_FILE
    trains: ClassVar[bool] = False  # --model is trained, so it must be in this process
    processes: ClassVar[bool] = False  # several processes may run it: accelerate launch

    @classmethod
    def options(cls) -> list[Option]:
        known = {o.name for o in cls.takes}
        of_settings = setting_options(cls.settings, [*cls.hidden, *known])
        return [*cls.takes, *of_settings, *cls.common]

    @abstractmethod
    def run(self, call: Call) -> None:
        """Do what the verb does."""
