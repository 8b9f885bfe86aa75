"""Commands that are made of the stages' verbs: their options, help and defaults are the verbs' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from solon.cli.common import parse_dtype
from solon.runs.options import REQUIRED, Option, Verb


def command_of(verb: type[Verb]) -> Callable[..., None]:
    """A function that typer makes a command of."""

    def command(**given: Any) -> None:
        from solon.runs.call import Call

        verb().run(Call(verb, given))

    parameters = [_parameter(option) for option in verb.options()]
    command.__name__ = verb.name.replace("-", "_")
    command.__doc__ = inspect.getdoc(verb)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.verb = verb  # type: ignore[attr-defined]
    return command


def _parameter(option: Option) -> inspect.Parameter:
    more: dict[str, Any] = {"help": option.help}
    if option.environment:
        more["envvar"] = option.environment
    whole = option.kind in (int, int | None)
    if option.low is not None:
        more["min"] = int(option.low) if whole else option.low
    if option.high is not None:
        more["max"] = int(option.high) if whole else option.high
    if option.name == "dtype":
        more |= {"parser": parse_dtype, "metavar": "DTYPE"}
    names = [option.flag] if option.flag else []
    if option.kind is bool and not option.flag:
        name = f"--{option.name.replace('_', '-')}"
        names = [name] if option.default is False else [f"{name}/--no-{option.name.replace('_', '-')}"]
    kind = option.kind if option.kind is not Path else Path
    annotation = Annotated[kind, typer.Option(*names, **more)]  # type: ignore[valid-type]
    default = inspect.Parameter.empty if option.default is REQUIRED else option.default
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
