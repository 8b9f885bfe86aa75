"""The stages of a run, one file each, and the order in which a recipe runs them."""

from __future__ import annotations

import heapq
from functools import cache
from graphlib import CycleError, TopologicalSorter
from inspect import isabstract
from typing import Any

from solon.errors import InputError
from solon.plugins import discover
from solon.runs.common import Common
from solon.runs.options import Verb
from solon.stages.artifacts import DATA, START_MODEL
from solon.stages.base import Stage

GROUP = "solon.stages"  # entry points of other packages
PROVIDED = frozenset({DATA, START_MODEL})  # a run has these artifacts before its first stage


def _discover(base: type[Any], noun: str) -> list[Any]:
    """The concrete subclasses of a base class in this folder and behind the entry points of other packages."""

    def concrete(value: Any, *bases: type[Any]) -> bool:
        return isinstance(value, type) and issubclass(value, bases) and not isabstract(value) and hasattr(value, "name")

    return discover("solon.stages", GROUP, lambda x: concrete(x, base), noun, valid=lambda x: concrete(x, Stage, Verb))


@cache
def all_stages() -> tuple[Stage, ...]:
    """Every stage, in the order in which a recipe with all stages would run them."""
    return tuple(_sorted([kind() for kind in _discover(Stage, "stage")]))


@cache
def all_verbs() -> dict[str, type[Verb]]:
    """Every verb that a stage's file defines, by its name."""
    return {kind.name: kind for kind in _discover(Verb, "command")}


def in_order(recipe: Common) -> list[Stage]:
    """The stages of a recipe, each after the stages that make the artifacts it needs or uses.

    Raises InputError where a stage needs an artifact that no stage of the recipe makes.
    """
    stages = [s for s in all_stages() if s.runs(recipe)]
    available = PROVIDED | {a for s in stages for a in s.makes}
    for stage in stages:
        for artifact in stage.needs:
            if artifact not in available:
                raise InputError(f"the stage {stage.name} needs {artifact.name}, which no stage of this recipe makes")
    return _sorted(stages)


def _sorted(stages: list[Stage]) -> list[Stage]:
    """The stages, each after the stages that make the artifacts it needs or uses. Where that leaves a choice, by name."""
    by_name = {s.name: s for s in stages}
    sorter: TopologicalSorter[str] = TopologicalSorter(
        {s.name: {m.name for m in stages if {*s.needs, *s.uses} & {*m.makes}} - {s.name} for s in stages}
    )
    try:
        sorter.prepare()
    except CycleError as error:
        names = ", ".join(sorted(set(error.args[1])))
        raise InputError(f"the stages {names} wait for each other; look at what they need and make") from None
    ready: list[str] = []
    order: list[Stage] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, name)
        name = heapq.heappop(ready)
        order.append(by_name[name])
        sorter.done(name)
    return order
