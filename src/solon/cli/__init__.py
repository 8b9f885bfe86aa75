"""The command line: a command for each verb of the stages, and a few more. The commands only handle arguments.

Exit codes: 0 success; 1 a failure that Solon could not prevent; 2 wrong usage or input; 130 Ctrl-C, with everything
finished so far kept. Every failure is one line on stderr (`faults.py`).

`solon --version` starts without the stages: the commands are made when one of them is looked up.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solon import __version__
from solon.cli import pipeline, resources
from solon.cli.common import OneLine, guarded, parse_dtype
from solon.plugins import check_names

if TYPE_CHECKING:
    from solon.runs.options import Option, Verb

GROUPS: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
    "constitution": (
        "Inspect, check and compare constitutions.",
        {
            "show": resources.constitution_show,
            "validate": resources.constitution_validate,
            "diff": resources.constitution_diff,
        },
    ),
    "recipes": (
        "List, copy and check recipes.",
        {"ls": resources.recipes_ls, "cp": resources.recipes_cp, "validate": resources.recipes_validate},
    ),
    "models": ("Get the embedded model.", {"get": resources.models_get}),
}


def command_of(verb: type[Verb]) -> Callable[..., None]:
    """A function with the options, help and defaults of a stage's verb, which typer makes a command of."""

    def command(**options: Any) -> None:
        from solon.runs.call import Call

        verb().run(Call(verb, options))

    parameters = [_parameter(option) for option in verb.options()]
    command.__name__ = verb.name.replace("-", "_")
    command.__doc__ = inspect.getdoc(verb)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.verb = verb  # type: ignore[attr-defined]
    return command


def _parameter(option: Option) -> inspect.Parameter:
    from solon.runs.options import REQUIRED

    extra: dict[str, Any] = {"help": option.help}
    if option.environment:
        extra["envvar"] = option.environment
    to_number = int if option.kind in (int, int | None) else float
    extra |= {key: to_number(x) for key, x in (("min", option.low), ("max", option.high)) if x is not None}
    if option.name == "dtype":
        extra |= {"parser": parse_dtype, "metavar": "DTYPE"}
    names = [option.flag] if option.flag else []
    if option.kind is bool and not option.flag:
        name = option.name.replace("_", "-")
        names = [f"--{name}" if option.default is False else f"--{name}/--no-{name}"]
    annotation: Any = Annotated[option.kind, typer.Option(*names, **extra)]  # type: ignore[name-defined]
    default = inspect.Parameter.empty if option.default is REQUIRED else option.default
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@functools.cache
def _commands() -> dict[str, Any]:
    """Every command and group of commands, by name."""
    from solon.stages import all_verbs

    tree = typer.Typer(rich_markup_mode="markdown")
    check_names([*all_verbs(), "run", "report", "env", *GROUPS], "command")
    stage_verbs = {name: command_of(verb) for name, verb in all_verbs().items()}
    top: dict[str, Callable[..., Any]] = {"run": pipeline.run, **stage_verbs, "report": pipeline.report}
    for name, verb in {**top, "env": resources.env}.items():
        tree.command(name)(guarded(verb))
    for name, (about, verbs) in GROUPS.items():
        group = typer.Typer(cls=OneLine, no_args_is_help=True, help=about)
        for verb_name, verb in verbs.items():
            group.command(verb_name)(guarded(verb))
        tree.add_typer(group, name=name)
    return dict(typer.main.get_group(tree).commands)


class Commands(OneLine):
    """The group of all commands, made at the first look at them."""

    @property  # type: ignore[override]
    def commands(self) -> dict[str, Any]:
        return _commands()

    @commands.setter
    def commands(self, empty: dict[str, Any]) -> None:
        """Click's constructor sets the commands that it was given: none."""


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """**Solon**: Constitutional AI and RLAIF, end to end."""
    if version:
        print(__version__)
        raise typer.Exit()
