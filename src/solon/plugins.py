"""What other packages and new files add to Solon: stages, engines, judges, measures.

Something is found where it stands at the top of a module in its own folder of Solon, or behind an entry point of an
installed package, as pytest and Inspect AI have it:

    [project.entry-points."solon.stages"]
    my-stage = "my_package.my_stage:MyStage"
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from solon.errors import InputError


def discover(package: str, group: str, accept: Callable[[Any], bool]) -> list[Any]:
    """Every accepted object of the package's modules, in the order of their names, then those of entry points."""
    found: list[Any] = []
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        whole = importlib.import_module(f"{package}.{module.name}")
        given = [x for value in vars(whole).values() for x in (value if isinstance(value, tuple) else (value,))]
        imported = [x for x in given if isinstance(x, type) and x.__module__ != whole.__name__]
        found += [x for x in given if accept(x) and x not in imported]
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        added = load(entry)
        found += [x for x in (added if isinstance(added, tuple | list) else (added,)) if accept(x)]
    return list(dict.fromkeys(found))


def named(group: str, name: str) -> Any | None:
    """What an entry point of this group and name leads to; None where there is no such entry point."""
    entry = next((e for e in entry_points(group=group) if e.name == name), None)
    return None if entry is None else load(entry)


def load(entry: EntryPoint) -> Any:
    """Raises InputError where the package's module cannot be imported."""
    try:
        return entry.load()
    except Exception as error:  # an import runs code, which may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{entry.group}: {entry.name} ({entry.value}) cannot be loaded: {why}; mend or remove that package"
        ) from error
