"""The package declares what it imports, and says that it is typed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~\[]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


def imported(folder: str) -> dict[str, str]:
    """Each top-level package that the modules of a folder import, with the first module that imports the package."""
    packages: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                packages.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return packages


def undeclared(folder: str, requirements: list[str], own: set[str]) -> list[str]:
    known, distributions = declared(requirements), packages_distributions()
    return [
        f"{path} imports {name}"
        for name, path in imported(folder).items()
        if name not in sys.stdlib_module_names | own
        and not {d.lower().replace("_", "-") for d in distributions.get(name, [name])} & known
    ]


def test_every_package_that_solon_imports_is_declared() -> None:
    assert not undeclared("src", PROJECT["dependencies"], {"solon"})


def test_every_package_that_the_tests_and_docs_import_is_declared() -> None:
    requirements = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    own = {"solon", "tests", "benchmarks", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
    assert not undeclared("tests", requirements, own)
    assert not undeclared("docs", requirements, own)


def test_the_package_is_typed() -> None:
    assert (ROOT / "src/solon/py.typed").is_file()
