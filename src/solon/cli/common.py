"""What all verbs share: their options, how errors are said, what a script reads."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from solon import distributed
from solon.cli.faults import told, without_keys
from solon.errors import InputError, printable
from solon.terminal import safe_streams

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
    """Every failure becomes one line and an exit code (`faults.told`); Ctrl-C becomes 130.

    Nothing goes to stdout then, with --json either: a script reads the exit code. SOLON_DEBUG=1 shows the traceback of
    what is not the user's to mend.
    """

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        with safe_streams():
            try:
                _calm()
                _check_options(options)
                if distributed.world_size() > 1:
                    _one_of_several(verb, options)
                with _connections(options.get("max_connections")):
                    _look_at_models(verb, options)
                    verb(*args, **options)
                sys.stdout.flush()
            except typer.Exit:
                raise
            except KeyboardInterrupt:
                print("solon: stopped; everything finished so far is kept, run again to go on", file=sys.stderr)
                raise typer.Exit(130) from None
            except BrokenPipeError:  # whoever read stdout has gone, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(1) from None
            except Exception as error:
                _fail(error)

    return run


def _check_options(options: dict[str, Any]) -> None:
    """What no option of any verb may be: a number that is not finite, an empty name, bytes that are no text."""
    for option, value in options.items():
        name = f"--{option.strip('_').replace('_', '-')}"
        if isinstance(value, Path) and option in ("out", "to") and value.name in ("", ".."):
            raise InputError(f"{name}: names no file or folder of its own; give a new name")
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"{name} {item}: expected a finite number")
            if isinstance(item, str) and not item.strip() and option != "system":
                raise InputError(f"{name}: is empty; leave the option out, or give a value")
            if isinstance(item, str | Path) and not _is_text(str(item)):
                raise InputError(
                    f"{name} {printable(str(item), 80)}: holds bytes that are not UTF-8; give another name"
                )


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _look_at_models(verb: Callable[..., Any], options: dict[str, Any]) -> None:
    """The models and the constitution that a verb's options name are looked at before it works; a recipe's by `run`."""
    if verb.__name__ == "run":
        return
    trains = getattr(getattr(verb, "verb", None), "trains", False)
    given = {f"--{name}": options[name] for name in ("model", "gold") if isinstance(options.get(name), str)}
    if given:
        from solon.engines.look import look_at

        look_at(given, trained=("--model",) if trains else ())
    rewards = options.get("reward_model")
    if isinstance(rewards, str) and not Path(rewards).expanduser().is_dir():
        raise InputError(f"--reward-model {rewards}: no such directory; give one that `solon reward-model` wrote")
    if isinstance(rules := options.get("constitution"), str):
        from solon.constitution import load_constitution

        load_constitution(rules)


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


def _fail(error: Exception) -> NoReturn:
    if os.environ.get("SOLON_DEBUG") == "1" and not isinstance(error, InputError):
        print(without_keys("".join(traceback.format_exception(error))), file=sys.stderr)
    code, line = told(error)
    print(f"solon: {printable(line, 2000)}", file=sys.stderr)
    raise typer.Exit(code) from None


class OneLine(TyperGroup):
    """A group of verbs whose usage errors are one line too: what is wrong, and where the help is."""

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
    except Exception as error:  # typer brings its own copy of click, so the class has no public name
        said = getattr(error, "format_message", None)
        if said is None or getattr(error, "exit_code", None) != 2 or type(error).__name__ == "NoArgsIsHelpError":
            raise
        context: Any = getattr(error, "ctx", None)
        verb = context.command_path if context is not None else "solon"
        with safe_streams():
            print(f"solon: {_plainly(printable(said(), 2000)).rstrip('.')}; see {verb} --help", file=sys.stderr)
        raise typer.Exit(2) from None


def _plainly(message: str) -> str:
    """`--epochs: …` for click's `Invalid value for '--epochs': …`."""
    return re.sub(r"^Invalid value for '(--[\w-]+)'[^:]*: (\w)", lambda m: f"{m[1]}: {m[2].lower()}", message)


def _one_of_several(verb: Callable[..., Any], options: dict[str, Any]) -> None:
    """Of several processes the first one speaks."""
    if not getattr(getattr(verb, "verb", None), "processes", False):
        name = verb.__name__.replace("_", "-")
        raise InputError(f"{name} runs in one process; accelerate launch is for sft, reward-model and ppo")
    if not distributed.is_main():
        options["quiet"] = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def _calm() -> None:
    """Libraries say what went wrong, not what went on."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|trl")
    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()
    import datasets

    datasets.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def last_line(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
