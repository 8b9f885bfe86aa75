"""A whole run: its stages, then its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from solon.recipes.pipeline import resolved, run_stages
from solon.recipes.recipe import Recipe
from solon.report.data import write_report
from solon.runs.run import Run


def run_recipe(recipe: Recipe, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run every stage of the recipe in `out`, or what is left of them, and write the report. Returns its data."""
    began = time.monotonic()
    with Run(resolved(recipe, out), out, quiet=quiet) as run:
        run_stages(run, recipe.dtype)
        return write_report(run, time.monotonic() - began)
