"""What a stage is. Each stage is one file in this folder, or in another package, and that file says everything about it.

A stage has a name, settings (which are its part of the recipe and its verb's options), what it needs and makes, what it
will cost, how it runs, and what it has to show in the report. The recipe's schema, `--dry-run`, the order of a run, resume,
the ledger, the command line, the report and the reference page follow from these. `docs/extending.md` adds one step by step.

Stages pass `Artifact`s to each other. A stage runs after every stage that makes something it needs or uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from solon.records import Record
from solon.runs import Artifact
from solon.runs.common import Common
from solon.settings import Settings
from solon.tables import Section

if TYPE_CHECKING:
    from solon.runs.run import Run
    from solon.stages.plan import Plan

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R", bound=Record)


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
    def run(self, run: Run) -> None:
        """Do the work, and put what the stage makes into the run."""

    def gather(self, run: Run) -> dict[str, Any]:
        """What the stage adds to the report's data, as JSON."""
        return {}

    def warnings(self, run: Run) -> list[str]:
        """What a reader of the report must know before believing a number."""
        return []

    def sections(self, data: dict[str, Any]) -> list[Section]:
        """What the stage shows, out of the report's data."""
        return []

    def checks(self, run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
        """What a run of this stage should show, and whether this one does: see `analysis.checks.check`."""
        return []
