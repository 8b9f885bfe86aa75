"""`solon run` and `solon report`: the whole pipeline, and the report of a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from solon.cli.common import AsJson, MaxConnections, Out, Quiet, Seed, last_line
from solon.errors import InputError, printable


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `solon recipes ls`) or file.")],
    out: Out,
    dry_run: Annotated[
        bool, typer.Option(help="Print the stages with estimated records, tokens, time and cost.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Instead of the recipe's model.", envvar="SOLON_MODEL")] = None,
    constitution: Annotated[
        str | None, typer.Option(help="Instead of the recipe's.", envvar="SOLON_CONSTITUTION")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for any key of the recipe; repeatable.")
    ] = None,
    max_connections: MaxConnections = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """The whole pipeline. Run again on the same directory, it resumes.

    Example: `solon run hybrid --out runs/first`
    """
    from solon.engines.look import look_at
    from solon.recipes.estimate import estimate, estimate_table
    from solon.recipes.pipeline import chosen
    from solon.recipes.recipe import load_recipe
    from solon.report.render import checks_table, summary_lines, summary_table
    from solon.report.run import run_recipe
    from solon.runs.ledger import total_cost
    from solon.stages.data import Data
    from solon.stages.feedback_model import FeedbackModelSettings
    from solon.terminal import Console
    from solon.yaml_text import assignment

    overrides: dict[str, Any] = dict(assignment(text) for text in set_ or [])
    overrides |= {k: v for k, v in (("model", model), ("constitution", constitution), ("seed", seed)) if v is not None}
    loaded = load_recipe(recipe, overrides)
    look_at(
        loaded.models(),
        trained=("model",) if loaded.of(FeedbackModelSettings).warmup is None else ("model", "feedback.judge"),
    )
    if dry_run:
        rows, inputs = estimate(loaded), Data(loaded)
        if not quiet:
            for line in chosen(loaded, inputs):
                print(f"solon: {line}", file=sys.stderr)
        Console().print(estimate_table(loaded, rows))
        last_line(json_, {"stages": rows, "cost_usd": total_cost(rows), "heldout": inputs.split()})
        return
    data = run_recipe(loaded, out, quiet=quiet)
    if not quiet:
        Console().print(summary_table(data))
        Console().print(checks_table(data))
        for line in summary_lines(data):
            print(line)
    print(f"report: {out / 'report.html'}")
    parts = {key: data[key] for key in ("headline", "checks", "left_out", "heldout", "kl")}
    last_line(json_, {"report": str(out / "report.html"), **parts, "cost_usd": total_cost(data["stages"])})


def report(
    directory: Annotated[Path, typer.Argument(help="A finished run.")], seed: Seed = None, quiet: Quiet = False,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Write a run's report again from its data.

    Example: `solon report runs/first`
    """
    from solon.publishing import write_whole
    from solon.report.render import render_html, render_markdown

    path = directory / "report.json"
    if not path.is_file():
        raise InputError(f"{directory}: no finished run here; run `solon run RECIPE --out {directory}` first")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        markdown, html = render_markdown(data), render_html(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {printable(str(error), 120)}"
        raise InputError(
            f"{path}: damaged, or written by another version of Solon ({why}); run `solon run` on {directory} again"
        ) from error
    write_whole(directory / "report.md", markdown)
    write_whole(directory / "report.html", html)
    print(f"report: {directory / 'report.html'}")
    last_line(json_, {"report": str(directory / "report.html")})
