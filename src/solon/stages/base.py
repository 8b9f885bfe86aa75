"""What a stage is. Each stage is one file in this folder, or in another package, and that file says everything about it.

A stage has a name, settings (which are its part of the recipe and its verb's options), what it needs and makes, what it
will cost, how it runs, and what it has to show in the report. The recipe's schema, `--dry-run`, the order of a run, resume,
the ledger, the command line, the report and the reference page follow from these. `docs/extending.md` adds one step by step.

Stages pass `Artifact`s to each other. A stage runs after every stage that makes something it needs or uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from solon import __version__
from solon.constitution import Constitution
from solon.engines import Engine, Failure, LazyEngine
from solon.publishing import Identity
from solon.records import Record
from solon.settings import Settings
from solon.stages.common import Common
from solon.tables import Section
from solon.training.settings import Log, Progress

if TYPE_CHECKING:
    from solon.stages.plan import Plan

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Artifact(Generic[T_co]):
    """Something that a run has from a stage or from the recipe's files, by name."""

    name: str


class Context(ABC):
    """A run, as a stage sees it. `runs/run.py` wraps files, resume, progress and cost around what a stage does here."""

    recipe: Common
    constitution: Constitution
    dir: Path

    @abstractmethod
    def records(
        self,
        stage: str,
        items: Sequence[Any],
        make: Callable[[Sequence[Any]], Iterable[R]],
        kind: type[R],
        *,
        engines: Sequence[Engine] = (),
        what: str = "records",
        left_out: Mapping[str, int] | None = None,
        made_from: Identity | None = None,
    ) -> list[R]:
        """Turn items into records of the same ids, batch by batch; each record is journalled as it comes.

        make: records of a batch of items; it tells of an item without a record by `fail`. left_out: how many were not
        even items, by reason. made_from: what the records are made from beside the items and the engines' models.
        """

    @abstractmethod
    def once(
        self,
        stage: str,
        work: Callable[[Progress], dict[str, Any]],
        *,
        engines: Sequence[Engine] = (),
        total: int = 1,
        what: str = "steps",
        makes: Path | None = None,
        made_from: Identity,
    ) -> dict[str, Any]:
        """Work that is done as a whole or not at all, such as training. Returns what `work` returned.

        makes: the model directory that it writes. made_from: each part with its `name` and `fingerprint`; where one of
        them is another one than before, what stands there is kept aside and the work is done again.
        """

    @abstractmethod
    def path(self, stage: str, name: str = "records.jsonl") -> Path:
        """A file of a stage."""

    @abstractmethod
    def journal(self, stage: str) -> AbstractContextManager[Callable[[dict[str, Any]], Any]]:
        """Inside, the stage's journal is open: call what it yields with each record. An id is not written twice."""

    @abstractmethod
    def journalled(self, stage: str) -> list[dict[str, Any]]:
        """The records in a stage's journal."""

    @abstractmethod
    def model(self, name: str) -> Path:
        """Where a model of this run stands, or will stand."""

    @abstractmethod
    def state(self, stage: str) -> dict[str, Any]:
        """What a stage's stage.json says; empty before the stage began."""

    @abstractmethod
    def take_up(self, stage: str, made_from: Identity) -> dict[str, Any]:
        """The stage's state, to go on with; empty where it was made from something else, which is set aside."""

    @abstractmethod
    def reopen(self, stage: str, why: str) -> None:
        """Let a stage that was done be made again, and say why."""

    @abstractmethod
    def fail(self, failure: Failure) -> None:
        """Note, of the stage under way, why nothing was made of an item."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Tell the person one line."""

    @abstractmethod
    def log(self, stage: str, config: Mapping[str, Any]) -> AbstractContextManager[Log]:
        """Where the numbers of a training go: TensorBoard and the trackers that the recipe names."""

    @abstractmethod
    def tracked(self, stage: str, step: Progress, settings: Settings) -> AbstractContextManager[Progress]:
        """A trainer's progress callback that also logs what it shows."""

    # --- artifacts ---

    def __init__(self) -> None:
        self._artifacts: dict[Artifact[Any], Any] = {}

    def put(self, artifact: Artifact[T], value: T) -> None:
        self._artifacts[artifact] = value

    def find(self, *artifacts: Artifact[T]) -> T | None:
        """The first of these that this run has; None where it has none of them."""
        return next((self._artifacts[a] for a in artifacts if a in self._artifacts), None)

    def get(self, *artifacts: Artifact[T]) -> T:
        """The first of these that this run has."""
        found = self.find(*artifacts)
        if found is None:
            raise LookupError(
                f"the run has no {' and no '.join(a.name for a in artifacts)}: needs or uses leaves it out"
            )
        return found

    # --- what most stages need ---

    def engine(self, spec: str) -> LazyEngine:
        """The engine behind what `--model` takes, opened when it is first asked."""
        return LazyEngine(spec, system=self.recipe.system, dtype=self.recipe.dtype)

    def meta(self, engine: Engine, **more: Any) -> dict[str, Any]:
        """What stands in each record's `meta`."""
        return provenance(self.constitution, engine, self.recipe.seed, **more)


def provenance(constitution: Constitution, engine: Engine, seed: int, **more: Any) -> dict[str, Any]:
    """What made a record: constitution, model, seed and version."""
    return {
        "constitution": constitution.fingerprint,
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "seed": seed,
        "solon": __version__,
        **more,
    }


class Stage(ABC):
    """One stage. Define `name` and `run`; everything else has a default."""

    name: ClassVar[str]
    part: ClassVar[str] = ""  # the key of its settings in a recipe; several stages may share one
    settings: ClassVar[type[Settings] | None] = None
    optional: ClassVar[bool] = False  # without the part in its recipe, a run leaves the stage out
    needs: ClassVar[tuple[Artifact[Any], ...]] = ()
    uses: ClassVar[tuple[Artifact[Any], ...]] = ()  # taken where a stage of this run makes them
    makes: ClassVar[tuple[Artifact[Any], ...]] = ()

    def runs(self, recipe: Common) -> bool:
        """Whether this recipe has the stage."""
        return self.settings is None or recipe.find(self.settings) is not None

    def check(self, recipe: Common) -> None:
        """Raises ValueError, in one line, where the recipe's settings do not go together."""
        return None

    def models(self, recipe: Common) -> dict[str, str]:
        """Every model that the stage's settings name, by the recipe's key."""
        return {}

    def told(self, recipe: Common) -> Iterable[str]:
        """What a run takes where the recipe leaves it open, in lines for a person."""
        return ()

    def estimate(self, plan: Plan) -> None:
        """Add the stage's rows to what `--dry-run` shows."""
        return None

    @abstractmethod
    def run(self, run: Context) -> None:
        """Do the work, and put what the stage makes into the run."""

    def gather(self, run: Context) -> dict[str, Any]:
        """What the stage adds to the report's data, as JSON."""
        return {}

    def warnings(self, run: Context) -> list[str]:
        """What a reader of the report must know before believing a number."""
        return []

    def sections(self, data: dict[str, Any]) -> list[Section]:
        """What the stage shows, out of the report's data."""
        return []

    def checks(self, run: Context, data: dict[str, Any]) -> list[dict[str, Any]]:
        """What a run of this stage should show, and whether this one does: see `analysis.checks.check`."""
        return []
