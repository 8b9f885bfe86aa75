"""The command line: one verb a stage, nothing but argument handling.

Exit codes: 0 success; 1 a failure that could not be prevented; 2 wrong usage or input; 130 Ctrl-C, with everything
finished so far kept. Every failure is said in one line (`faults.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from solon import __version__
from solon.cli import pipeline, things
from solon.cli.common import OneLine, guarded
from solon.cli.derived import command_of
from solon.stages import all_verbs

app = typer.Typer(
    cls=OneLine, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
)
VERBS: dict[str, Callable[..., Any]] = {
    "run": pipeline.run,
    **{name: command_of(verb) for name, verb in all_verbs().items()},
    "report": pipeline.report,
    "env": things.env,
}
GROUPS: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
    "constitution": (
        "Inspect, check and compare constitutions.",
        {
            "show": things.constitution_show,
            "validate": things.constitution_validate,
            "diff": things.constitution_diff,
        },
    ),
    "recipes": (
        "List, copy and check recipes.",
        {"ls": things.recipes_ls, "cp": things.recipes_cp, "validate": things.recipes_validate},
    ),
    "models": ("Get the embedded model.", {"get": things.models_get}),
}

for name, verb in VERBS.items():
    app.command(name)(guarded(verb))
for group, (about, verbs) in GROUPS.items():
    part = typer.Typer(cls=OneLine, no_args_is_help=True, help=about)
    for name, verb in verbs.items():
        part.command(name)(guarded(verb))
    app.add_typer(part, name=group)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """**Solon**: Constitutional AI and RLAIF, end to end."""
    if version:
        print(__version__)
        raise typer.Exit()
