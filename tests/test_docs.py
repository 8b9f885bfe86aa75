"""The docs are true where a program can tell: links lead somewhere, commands and recipes exist, reference pages are current."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from solon.cli import app
from solon.constitution import load_constitution
from solon.recipes.recipe import Recipe, builtin_recipes
from solon.runs.common import read_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/notes").glob("*.md")])
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)


def blocks(page: Path, language: str) -> Iterator[str]:
    return (text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+?) *$", text, re.M)
    plain = [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name}: {target}: {file.name} has no such heading"


def commands_in(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "solon" in words[:6]:
            words = words[words.index("solon") + 1 :]
            stop = next((i for i, w in enumerate(words) if w in ("|", ">", "&&", ";", "2>", "&")), len(words))
            yield words[:stop]


def check_command(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {name for p in command.params for name in [*p.opts, *p.secondary_opts]} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{command.name} has no {word}"
    for flag, setting in itertools.pairwise(words):
        if flag == "--set" and command.name == "run":
            kind: Any = Recipe
            for key in setting.split("=")[0].split("."):
                parts = [kind, *getattr(kind, "__args__", ())]
                fields = next((p.model_fields for p in parts if hasattr(p, "model_fields")), {})
                assert key in fields, f"--set {setting}: no such key"
                kind = fields[key].annotation


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_exists(name: str) -> None:
    for text in blocks(ROOT / name, "sh"):
        for words in commands_in(text):
            check_command(words)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_can_be_read(name: str, tmp_path: Path) -> None:
    """JSON lines, Python, recipes and constitutions. A block of YAML is a recipe where its keys are a recipe's."""
    page = ROOT / name
    for text in blocks(page, "json"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        whole_lines = all(line[-1:] in "}]" and line[:1] in "{[" for line in lines)
        for line in lines if whole_lines else [" ".join(lines)]:  # a page wraps long lines
            json.loads(line)
    for text in blocks(page, "python"):
        ast.parse(text)
    for text in blocks(page, "yaml"):
        keys = set(re.findall(r"^(\w+):", text, re.M))
        if "principles" in keys and "name" in keys:
            path = tmp_path / "constitution.yaml"
            path.write_text(text, encoding="utf-8")
            load_constitution(str(path))
        elif keys and keys <= set(Recipe.model_fields):
            whole = text if "name" in keys else f"name: example\n{text}"
            read_recipe(Recipe, whole.encode("utf-8"), name)


def test_the_reference_pages_are_what_the_program_says() -> None:
    found = subprocess.run([sys.executable, "docs/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, f"run make docs; not current: {found.stderr}"


def test_every_recipe_key_that_ships_is_in_the_reference() -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for name in [*Recipe.model_fields, *builtin_recipes()]:
        assert f"`{name}`" in text


@pytest.mark.slow
def test_the_docs_are_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "getting-started.html").is_file()
