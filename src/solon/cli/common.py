"""What all verbs share: their options, how errors are said, what a script reads."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from solon import __version__, processes
from solon.cli.faults import told, without_keys
from solon.errors import InputError, printable
from solon.terminal import safe_streams

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.", envvar="SOLON_SEED")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", envvar="SOLON_QUIET")]
AsJson = Annotated[bool, typer.Option("--json", help="A machine-readable last line on stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Model = Annotated[
    str,
    typer.Option(
        help="smollm2, a directory, a .gguf file, a hub id, or server:MODEL@http://host:port/v1; "
        "for a judge also decision:DIR_OR_ID or systemone:MODEL@http://host:port/v1.",
        envvar="SOLON_MODEL",
    ),
]
ConstitutionName = Annotated[
    str, typer.Option("--constitution", help="A built-in name or a file.", envvar="SOLON_CONSTITUTION")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")]
System = Annotated[str, typer.Option(help='The system message every chat starts with; "" sends none.')]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin anew where --out holds what Solon made of other settings or inputs.")
]
ReportTo = Annotated[list[str] | None, typer.Option(help="Trackers beside TensorBoard: wandb, trackio, mlflow …")]
SYSTEM = "You are a helpful assistant."


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
                if processes.world() > 1:
                    _one_of_several(verb.__name__, options)
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
            print(f"solon: {printable(said(), 2000).rstrip('.')}; see {verb} --help", file=sys.stderr)
        raise typer.Exit(2) from None


def _one_of_several(verb: str, options: dict[str, Any]) -> None:
    """Of several processes the first one speaks."""
    if verb not in ("sft", "reward_model", "ppo"):
        name = verb.replace("_", "-")
        raise InputError(f"{name} runs in one process; accelerate launch is for sft, reward-model and ppo")
    if not processes.is_main():
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


def meta(rules: Any, engine: Any, seed: int | None, **more: Any) -> dict[str, Any]:
    return {
        "constitution": rules.fingerprint,
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "seed": seed or 0,
        "solon": __version__,
        **more,
    }


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as YAML."""
    from solon.yaml_text import YamlText

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f'--set "{text}": expected KEY=VALUE, such as ppo.updates=4')
    return key.strip(), YamlText(f"--set {key.strip()}", value, what="setting").read_value()


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
