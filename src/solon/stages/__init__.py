"""The stages of a run, one file each, and the order in which a recipe runs them."""

from __future__ import annotations

import heapq
from functools import cache
from inspect import isabstract
from typing import Any

from solon.errors import InputError
from solon.plugins import discover
from solon.runs import Artifact
from solon.runs.common import Common
from solon.runs.options import Verb
from solon.stages.artifacts import DATA, START_MODEL
from solon.stages.base import Stage

GROUP = "solon.stages"  # entry points of other packages
PROVIDED = frozenset({DATA, START_MODEL})  # what a run has before its first stage


def _is_stage(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Stage) and not isabstract(found) and hasattr(found, "name")


def _is_verb(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Verb) and not isabstract(found) and hasattr(found, "name")


@cache
def all_stages() -> tuple[Stage, ...]:
    """Every stage that there is, in the order in which they would run if a recipe had them all."""
    stages = [kind() for kind in discover("solon.stages", GROUP, _is_stage)]
    names = [s.name for s in stages]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"two stages are called {twice[0]}; rename the one of your package")
    return tuple(_sorted(stages))


@cache
def all_verbs() -> dict[str, type[Verb]]:
    """Every verb that a stage's file defines, by its name."""
    return {kind.name: kind for kind in discover("solon.stages", GROUP, _is_verb)}


def stage_named(name: str) -> Stage | None:
    return next((s for s in all_stages() if s.name == name), None)


def in_order(recipe: Common) -> list[Stage]:
    """The stages of a recipe, each after those that make what it needs or uses.

    Raises InputError where a stage needs something that no stage of the recipe makes.
    """
    stages = [s for s in all_stages() if s.runs(recipe)]
    made = PROVIDED | {a for s in stages for a in s.makes}
    for stage in stages:
        for artifact in stage.needs:
            if artifact not in made:
                raise InputError(f"the stage {stage.name} needs {artifact.name}, which no stage of this recipe makes")
    return _sorted(stages)


def _sorted(stages: list[Stage]) -> list[Stage]:
    """Stages after those that make what they need or use; where that leaves a choice, by name."""
    by_name = {s.name: s for s in stages}
    makers: dict[Artifact[Any], set[str]] = {}
    for s in stages:
        for artifact in s.makes:
            makers.setdefault(artifact, set()).add(s.name)
    waits = {s.name: {m for a in (*s.needs, *s.uses) for m in makers.get(a, ())} - {s.name} for s in stages}
    ready = sorted(name for name, before in waits.items() if not before)
    order: list[Stage] = []
    while ready:
        name = heapq.heappop(ready)
        order.append(by_name[name])
        for other, before in waits.items():
            if name in before:
                before.remove(name)
                if not before:
                    heapq.heappush(ready, other)
    if len(order) < len(stages):
        rest = ", ".join(sorted(set(by_name) - {s.name for s in order}))
        raise InputError(f"the stages {rest} wait for each other; look at what they need and make")
    return order
