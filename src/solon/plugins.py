"""Stages, engines, judges and measures that other packages or new files add to Solon.

An addition is an object at the top level of a module in the matching folder of Solon, or behind an entry point of an
installed package, as in pytest and Inspect AI:

    [project.entry-points."solon.stages"]
    my-stage = "my_package.my_stage:MyStage"
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from solon.errors import InputError


def discover(
    package: str, group: str, accept: Callable[[Any], bool], noun: str, valid: Callable[[Any], bool] | None = None
) -> list[Any]:
    """Every accepted object of the package's modules, in the order of their names, then those of entry points.

    noun: the word for one object, for messages. valid: whether an entry point may name the object; None: as `accept`.
    Raises InputError where an entry point names another object, and where two accepted objects have one name.
    """
    accepted: list[Any] = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        items = [x for value in vars(module).values() for x in (value if isinstance(value, tuple) else (value,))]
        imported = [x for x in items if isinstance(x, type) and x.__module__ != module.__name__]
        accepted += [x for x in items if accept(x) and x not in imported]
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        value = load(entry)
        for item in value if isinstance(value, tuple | list) else (value,):
            if not (valid or accept)(item):
                missing = ", ".join(sorted(getattr(item, "__abstractmethods__", ())))
                fault = f"lacks {missing}" if missing else f"is no {noun}"
                raise InputError(f"{group}: {entry.name} ({entry.value}) {fault}; mend or remove that package")
            accepted += [item] if accept(item) else []
    different = list(dict.fromkeys(accepted))
    check_names([item.name for item in different], noun)
    return different


def check_names(names: Sequence[str], noun: str) -> None:
    """Raises InputError where a name stands twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two {noun}s are called {twice[0]}; rename the one of your package")


def as_number(value: Any, source: str) -> float:
    """The number that an addition gave, of any number type. Raises InputError for another value. source: for the message."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InputError(f"{source} gave {value!r}; it must give a number or None")
    return number


def packages() -> set[str]:
    """The top-level packages behind the entry points of every group of Solon."""
    entries = entry_points()
    groups = [group for group in entries.groups if group.startswith("solon.")]
    return {
        entry.value.partition(":")[0].partition(".")[0] for group in groups for entry in entries.select(group=group)
    }


def named(group: str, name: str) -> Any | None:
    """The object behind the entry point of this group and name; None where there is no such entry point."""
    entry = next((e for e in entry_points(group=group) if e.name == name), None)
    return None if entry is None else load(entry)


def load(entry: EntryPoint) -> Any:
    """The object behind an entry point. Raises InputError where the package's module cannot be imported."""
    try:
        return entry.load()
    except Exception as error:  # an import runs code, which may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{entry.group}: {entry.name} ({entry.value}) cannot be loaded: {why}; mend or remove that package"
        ) from error
