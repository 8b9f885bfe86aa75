"""The base class of stages. Each stage is one file in this folder, or in another package, and the file holds all of the stage.

A stage has a name, settings (its section of the recipe and the options of its verb), artifacts that it needs and makes, an estimate
of its cost, its work, and the tables that it shows in the report. The recipe's schema, `--dry-run`, the order of a run, resume, the
ledger, the command line, the report and the reference page follow from these. `docs/extending.md` adds a stage step by step.

Stages pass `Artifact`s to each other. A stage runs after every stage that makes an artifact it needs or uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from solon.runs import Artifact
from solon.runs.common import Common
from solon.settings import Settings
from solon.stages.plan import Plan
from solon.tables import Section

if TYPE_CHECKING:
    from solon.runs.run import Run


class Stage(ABC):
    """One stage. A subclass defines `name` and `run`; everything else has a default."""

    name: ClassVar[str]
    part: ClassVar[str] = ""  # the key of the stage's settings in a recipe; several stages may share one
    settings: ClassVar[type[Settings] | None] = None
    optional: ClassVar[bool] = False  # a run whose recipe has no such section leaves the stage out
    needs: ClassVar[tuple[Artifact[Any], ...]] = ()
    uses: ClassVar[tuple[Artifact[Any], ...]] = ()  # the stage takes these where a stage of this run makes them
    makes: ClassVar[tuple[Artifact[Any], ...]] = ()

    def runs(self, recipe: Common) -> bool:
        """Whether this recipe has the stage."""
        return self.settings is None or recipe.find(self.settings) is not None

    def check(self, recipe: Common) -> None:
        """Raises ValueError, in one line, where the recipe's settings contradict each other."""
        return None

    def models(self, recipe: Common) -> dict[str, str]:
        """Every model that the stage's settings name, by the recipe's key."""
        return {}

    def describe(self, recipe: Common) -> Iterable[str]:
        """Lines for the user that say what a run takes where the recipe leaves it open."""
        return ()

    def estimate(self, plan: Plan) -> None:
        """Add the stage's rows to the table of `--dry-run`."""
        return None

    @abstractmethod
    def run(self, run: Run) -> None:
        """Do the work, and put the artifacts that the stage makes into the run."""

    def gather(self, run: Run) -> dict[str, Any]:
        """The stage's part of the report's data, as JSON."""
        return {}

    def warnings(self, run: Run) -> list[str]:
        """Sentences that a reader of the report must know before believing a number."""
        return []

    def sections(self, data: dict[str, Any]) -> list[Section]:
        """The stage's tables in the report, made from the report's data."""
        return []

    def checks(self, run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
        """The expectations of a run of this stage, each with whether this run meets it: see `analysis.checks.check`."""
        return []
