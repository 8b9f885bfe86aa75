"""The rooms of the house import downward only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import solon

SOURCE = Path(solon.__file__).parent
# From the ground up. A room may import from itself and from every room before it.
ROOMS = (
    "ground",  # the modules that stand in src/solon itself, and publishing
    "constitution",
    "data",
    "models",
    "engines",
    "measures",
    "training",
    "supervised",
    "feedback",
    "reinforcement",
    "human",
    "analysis",
    "runs",
    "stages",
    "recipes",
    "report",
    "cli",
)
GROUND = {"publishing"}
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a module, named as `solon.models.head` is."""
    parts = module.split(".")
    if len(parts) < 2 or parts[1] in GROUND:
        return "ground"
    return parts[1] if parts[1] in ROOMS else "ground"


def imports(path: Path) -> set[str]:
    """The modules of Solon that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (SOURCE.parent / inner.replace(".", "/")).with_suffix(".py").is_file()
                found.add(inner if is_module else str(node.module))
    return {name for name in found if name.split(".")[0] == "solon"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_room_imports_only_from_the_rooms_below_it(path: Path) -> None:
    if path.name == "__main__.py":
        return
    own = ROOMS.index(room_of("solon." + ".".join(path.with_suffix("").parts)))
    upward = {name for name in imports(path) if ROOMS.index(room_of(name)) > own}
    assert not upward, f"{path} imports from a room above it: {', '.join(sorted(upward))}"


def test_every_folder_is_a_room() -> None:
    folders = {path.parts[0] for path in MODULES if len(path.parts) > 1}
    assert folders <= {*ROOMS, *GROUND}
