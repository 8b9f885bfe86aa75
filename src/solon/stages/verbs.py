"""What a verb of the command line is: a stage on its own, from file to file.

A verb names its options; those that are settings follow from the settings' own fields, so that a verb and a recipe have one
default. `cli/derived.py` makes a command of each verb, `runs/verbs.py` does for it what `runs/run.py` does for a stage.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from solon.constitution import Constitution
from solon.engines import Failure, LazyEngine, OnFailure
from solon.errors import printable
from solon.publishing import Directory, File, Identity
from solon.records import Record
from solon.settings import DEFAULT_SYSTEM, Settings
from solon.training.settings import Log, Progress

S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound=Record)
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


def setting_options(kinds: Sequence[type[Settings]], hidden: Iterable[str] = ()) -> list[Option]:
    """An option for each field of these settings, those of settings inside them included."""
    found: list[Option] = []
    for kind in kinds:
        for name, info in kind.model_fields.items():
            inner = info.annotation
            if isinstance(inner, type) and issubclass(inner, Settings):
                found += setting_options([inner], hidden)
            elif name not in hidden and (plain := _plain(inner)) is not None:
                low, high = _bounds(info)
                default = info.get_default(call_default_factory=True)
                about = (info.description or "").replace("; null:", "; where none is given:")
                found.append(Option(name, plain, default, about, low, high))
    return found


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


def make_settings(kind: type[S], given: dict[str, Any]) -> S:
    """Settings of this kind out of options, by the names of the fields; those inside them likewise."""
    values: dict[str, Any] = {}
    for name, info in kind.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            values[name] = make_settings(inner, given)
        elif name in given and (given[name] is not None or info.default is None):
            values[name] = given[name]
    return kind.model_validate(values)


@dataclass
class Outcome:
    """What became of a verb's items."""

    records: int = 0  # in the file now, those of earlier starts included
    failures: dict[str, Failure] = field(default_factory=dict)  # by item, of those that no record was made of
    abstained: Counter[str] = field(default_factory=Counter)  # reasons of the records that hold no answer

    @property
    def reasons(self) -> dict[str, int]:
        """Why there is no answer, the commonest reason first, and of how many items."""
        found = self.abstained + Counter(f.reason for f in self.failures.values())
        return dict(found.most_common())

    @property
    def failed(self) -> int:
        return len(self.failures) + self.abstained.total()

    def summary(self) -> dict[str, Any]:
        return {"records": self.records, "failed": self.failed, "reasons": self.reasons}

    @property
    def open(self) -> int:
        """How many items a later start may still get an answer for: the model was out of reach."""
        return sum(f.again for f in self.failures.values())

    @property
    def nothing(self) -> bool:
        """Whether no item has an answer."""
        return self.records <= self.abstained.total()

    def line(self, out: Path, what: str) -> str:
        """The outcome in one line for a person."""
        if not self.failed:
            return f"{out}: {self.records} {what}"
        told = "; ".join(f"{printable(reason, 160)} ({n})" for reason, n in list(self.reasons.items())[:3])
        more = f"; {len(self.reasons) - 3} other reasons" if len(self.reasons) > 3 else ""
        return f"{out}: {self.records} {what}; without an answer {self.failed}: {told}{more}"


@dataclass(frozen=True)
class Training:
    """A training on its own, as `Call.training` takes it."""

    made_from: Identity  # what the model is made from beside the model it starts from, the settings and the seed
    train: Callable[[Path, str, Progress], dict[str, Any]]  # into this directory, in this dtype
    measure: Callable[[Path, str], dict[str, Any]] | None = None  # on what was held out; kept as `heldout`
    left_out: dict[str, int] = field(default_factory=dict)  # by reason, before the training


class Call(ABC):
    """A verb as it was called: its options, and what wraps files, resume and progress around its work."""

    given: dict[str, Any]
    out: Path
    seed: int
    system: str
    dtype: str
    limit: int | None
    restart: bool
    quiet: bool

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    @property
    @abstractmethod
    def constitution(self) -> Constitution:
        """The constitution of --constitution."""

    @abstractmethod
    def of(self, kind: type[S], **changed: Any) -> S:
        """The settings of this kind, out of the options and --set."""

    @abstractmethod
    def engine(self) -> LazyEngine:
        """The engine of --model."""

    @abstractmethod
    def meta(self, engine: LazyEngine, **more: Any) -> dict[str, Any]:
        """What stands in each record's `meta`."""

    @abstractmethod
    def file(self, inputs: Sequence[str], beside: Sequence[Path] = ()) -> AbstractContextManager[File]:
        """Take --out for writing records. beside: JSON files of results that are written too."""

    @abstractmethod
    def records(
        self,
        target: File,
        items: Callable[[], Iterable[Any]],
        make: Callable[[Sequence[Any], OnFailure], Iterable[R]],
        kind: type[R],
        *,
        identity: Identity,
        made_of: Callable[[Any], Sequence[str]] = ...,
        seen: Callable[[R], None] = ...,
        batch_size: int = ...,
        served: bool = False,
        what: str,
    ) -> Outcome:
        """Turn items into records in the file: see `runs.verbs.to_file`."""

    @abstractmethod
    def end(self, outcome: Outcome, what: str, result: dict[str, Any] | None = None) -> None:
        """Say what was made and what was not. Ends with 1 where nothing was answered, or a later start may get the rest."""

    @abstractmethod
    def directory(self, inputs: Sequence[str | None], beside: Sequence[Path] = ()) -> AbstractContextManager[Directory]:
        """Take --out for writing a model."""

    @abstractmethod
    def training(self, inputs: Sequence[str], prepare: Callable[[], Training]) -> dict[str, Any]:
        """Train, unless the same command has done so already; say what was left out. prepare: reads the inputs."""

    @abstractmethod
    def progress(self) -> AbstractContextManager[Progress]:
        """A trainer's callback that draws a line on stderr."""

    @abstractmethod
    def log(self, config: dict[str, Any]) -> AbstractContextManager[Log]:
        """Where a training's numbers go: TensorBoard's beside --out, and the trackers of --report-to."""

    @abstractmethod
    def tell(self, text: str) -> None:
        """A line on stderr, of several processes once."""

    @abstractmethod
    def tell_again(self, again: bool) -> None:
        """Say that nothing was left to do, where it is so."""

    @abstractmethod
    def tell_left_out(self, left_out: dict[str, int], where: str) -> None:
        """Say what was left out, by reason."""

    @abstractmethod
    def result(self, value: dict[str, Any]) -> None:
        """What --json prints."""


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
