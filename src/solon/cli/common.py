"""What all commands share: options, one line for every failure, and the last line for a script."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from solon import distributed
from solon.cli.faults import explain, without_keys
from solon.errors import InputError, printable
from solon.terminal import safe_streams

# No telemetry, and no progress bars or log lines of the libraries beside Solon's own. Set before the libraries are
# imported: to import them only to silence them would take seconds.
for variable, setting in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(variable, setting)


Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.", envvar="SOLON_SEED")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", envvar="SOLON_QUIET")]
AsJson = Annotated[bool, typer.Option("--json", help="A machine-readable last line on stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        min=1, max=1000, help="Requests to a server at once; 8 where none is given.", envvar="SOLON_MAX_CONNECTIONS"
    ),
]


def parse_dtype(text: str) -> str:
    if text not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f'"{text}": expected auto, float32 or bfloat16')
    return text


Dtype = Annotated[str, typer.Option(parser=parse_dtype, metavar="DTYPE", help="auto, float32 or bfloat16.")]


def guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as a command: every failure becomes one line and an exit code (`faults.explain`); Ctrl-C becomes 130.

    A failure prints nothing on stdout, also with --json: a script reads the exit code. SOLON_DEBUG=1 shows the traceback
    of a failure that the user cannot mend.
    """

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        with safe_streams():
            try:
                warnings.filterwarnings("ignore", category=FutureWarning)
                warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|trl")
                logging.getLogger("accelerate").setLevel(logging.ERROR)
                _check_options(options)
                if distributed.world_size() > 1:
                    _silence_other_ranks(verb, options)
                with _connections(options.get("max_connections")):
                    _look_at_models(verb, options)
                    verb(*args, **options)
                sys.stdout.flush()
            except typer.Exit:
                raise
            except KeyboardInterrupt:
                print("solon: stopped; everything finished so far is kept, run again to go on", file=sys.stderr)
                raise typer.Exit(130) from None
            except BrokenPipeError:  # the program that read stdout has ended, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(1) from None
            except Exception as error:
                if os.environ.get("SOLON_DEBUG") == "1" and not isinstance(error, InputError):
                    print(without_keys("".join(traceback.format_exception(error))), file=sys.stderr)
                code, line = explain(error)
                print(f"solon: {printable(line, 2000)}", file=sys.stderr)
                raise typer.Exit(code) from None

    return run


def _check_options(options: dict[str, Any]) -> None:
    """Refuse, for any verb, a number that is not finite, an empty name, and bytes that are not UTF-8."""
    for option, value in options.items():
        name = f"--{option.strip('_').replace('_', '-')}"
        if isinstance(value, Path) and option in ("out", "to") and value.name in ("", ".."):
            raise InputError(f"{name}: names no file or folder of its own; give a new name")
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"{name} {item}: expected a finite number")
            if isinstance(item, str) and not item.strip() and option != "system":
                raise InputError(f"{name}: is empty; leave the option out, or give a value")
            if isinstance(item, str | Path) and re.search(r"[\0\ud800-\udfff]", str(item)):
                raise InputError(
                    f"{name} {printable(str(item), 80)}: holds bytes that are not UTF-8; give another name"
                )


def _look_at_models(verb: Callable[..., Any], options: dict[str, Any]) -> None:
    """Check the models and the constitution that the options name, before any work. `run` checks those of a recipe."""
    if verb.__name__ == "run":
        return
    trains = getattr(getattr(verb, "verb", None), "trains", False)
    models = {f"--{name}": options[name] for name in ("model", "gold") if isinstance(options.get(name), str)}
    if models:
        from solon.engines.look import look_at

        look_at(models, trained=("--model",) if trains else ())
    reward_model = options.get("reward_model")
    if isinstance(reward_model, str) and not Path(reward_model).expanduser().is_dir():
        raise InputError(f"--reward-model {reward_model}: no such directory; give one that `solon reward-model` wrote")
    if isinstance(constitution := options.get("constitution"), str):
        from solon.constitution import load_constitution

        load_constitution(constitution)


@contextmanager
def _connections(most: int | None) -> Iterator[None]:
    """--max-connections, for every endpoint that the verb opens."""
    if most is None:
        yield
        return
    from solon.engines.endpoint import MAX_CONNECTIONS

    token = MAX_CONNECTIONS.set(most)
    try:
        yield
    finally:
        MAX_CONNECTIONS.reset(token)


class OneLine(TyperGroup):
    """A group of commands whose errors are one line too, those of usage and those of packages that add commands."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _usage_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _usage_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        print(f"solon: {printable(str(error), 2000)}", file=sys.stderr)
        raise typer.Exit(2) from None
    except Exception as error:  # typer brings its own copy of click, so the class has no public name
        format_message = getattr(error, "format_message", None)
        is_usage_error = getattr(error, "exit_code", None) == 2 and type(error).__name__ != "NoArgsIsHelpError"
        if format_message is None or not is_usage_error:
            raise
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "solon"
        # `--epochs: …` for click's `Invalid value for '--epochs': …`
        message = re.sub(
            r"^Invalid value for '(--[\w-]+)'[^:]*: (\w)",
            lambda match: f"{match[1]}: {match[2].lower()}",
            printable(format_message(), 2000),
        )
        with safe_streams():
            print(f"solon: {message.rstrip('.')}; see {command} --help", file=sys.stderr)
        raise typer.Exit(2) from None


def _silence_other_ranks(verb: Callable[..., Any], options: dict[str, Any]) -> None:
    """Of several processes only the one of rank 0 prints. Raises InputError where the verb runs in one process only."""
    if not getattr(getattr(verb, "verb", None), "processes", False):
        name = verb.__name__.replace("_", "-")
        raise InputError(f"{name} runs in one process; accelerate launch is for sft, reward-model and ppo")
    if not distributed.is_main():
        options["quiet"] = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def last_line(as_json: bool, value: dict[str, Any]) -> None:
    """With --json: the command's result as one line of JSON."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
