"""Write the reference pages from the program itself: docs/recipes.md from the stages' settings, docs/commands.md from the verbs.

python docs/reference.py           # write both pages
python docs/reference.py --check   # end with 1 where a page is not what this program would write
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from solon.cli import app
from solon.recipes.recipe import Recipe, builtin_recipes
from solon.settings import Settings
from solon.stages import all_stages
from solon.stages.base import Stage

PAGES = Path(__file__).parent
RECIPES_HEAD = """# Recipe reference

A recipe is one YAML file. The recipe names the model, the data and the settings of every stage. `docs/reference.py` writes this page from
the program, so the page shows the keys, types and defaults of this version.

```sh
solon recipes ls                        # the shipped recipes
solon recipes cp constitutional my.yaml # a copy to change
solon recipes validate my.yaml          # reads the recipe and its data files, and loads no model
solon run my.yaml --out runs/my --dry-run
solon run my.yaml --out runs/my --set ppo.updates=20
```

- A key that the recipe leaves out has the default of this page. An unknown key is an error that names the file, the line and the nearest known key.
- `--set KEY=VALUE` changes one key for one run. A dot separates the levels: `--set prompts.n_helpful=0`.
- A run without an optional section leaves out the stages that read the section.
- A path in a recipe is relative to the folder in which you start `solon`.
- A section that leaves a key out keeps the default of that section. So `feedback: {sampling: {max_tokens: 12}}` keeps the temperature of
  `feedback.sampling`.
- `null` in the column "default" means that the key is not set. The description says what Solon then does.
- To see which keys matter for a task, begin with the page that the section names under "More".

"""
NOTES = {  # by section: what a single key's description has no room for
    "": "- `dtype`, `training_dtype`: on a GPU, `auto` takes bfloat16 where the GPU supports it, and measures no time. More: "
    "[choose the dtype](own-model.md#choose-the-dtype).\n"
    "- `batch_size`: a small value lowers the memory of generation, and makes generation slower. Solon generates at most 256 texts "
    "together, so a value above 256 changes neither. A larger batch repeats more work after a kill. The results differ only by rounding.",
    "adapter": "A recipe needs this section: `adapter: null` is refused, since every reinforcement algorithm needs adapters. More: "
    "[LoRA](own-model.md#lora-which-modules-and-how-to-change-that).",
    "prompts": "More: [held-out prompts](getting-started.md#held-out-prompts).",
    "human": "More: [human data](people.md), [how much data](training.md#how-much-data).",
    "gold": "PPO reads this section, if `ppo.check_every` is above 0. The other algorithms have no checks. The name is that of Gao et al. 2023 "
    "for a judge that the training does not push on. More: "
    "[monitors and alarms](training.md#monitors-and-alarms).",
    "warmup": "The keys of the training stand under `warmup.train` here, and directly under `feedback.warmup` in the section `feedback`. "
    "More: [your own demonstrations](constitution.md#your-own-demonstrations).",
    "feedback": "- `judge: self`: [which weights these are](judge.md#who-may-judge).\n"
    "- `few_shot` takes its examples from `human.comparisons`.\n"
    "- `adapter` belongs to the training `warmup`.\n"
    "- More: [judges](judge.md), [what a label is](judge.md#what-a-label-is), [direct RLAIF](training.md#direct-rlaif).",
    "supervised": "- `sft_on`: with `best` the judge chooses between the two. [Which text of a chain is learned](training.md#which-text-of-a-chain-is-learned). Take `final` or `all` for a model "
    "that revises well, and `best` for a small model. `best` asks the judge once more per prompt.\n"
    "- `responder: start` is for a warmed-up model that should revise responses as the untrained model gives them. `self` is the usual choice.",
    "reward_model": "More: [the reward model](training.md#reward-model).",
    "dpo": "More: [choose the algorithm](training.md#choose-the-algorithm).",
    "grpo": "`generation_batch_size` must be a multiple of `per_device_train_batch_size` and of `num_generations`. More: "
    "[choose the algorithm](training.md#choose-the-algorithm).",
    "ppo": "- `rollouts` must be a multiple of `responses_per_prompt`.\n"
    "- `updates`: a run keeps its recipe, so more updates need a new `--out`. Only the command `solon ppo` continues a finished training.\n"
    "- The score of a response loses `length_coefficient` × the difference between its length and `length_target`, divided by "
    "`length_target`.\n"
    "- More: [PPO settings, with their sources](training.md#ppo-settings), [KL](training.md#kl).",
    "rloo": "`generation_batch_size` must be a multiple of `per_device_train_batch_size` and of `num_generations`. More: "
    "[choose the algorithm](training.md#choose-the-algorithm).",
    "evaluation": "More: [read a report](report.md).",
}
COMMANDS_HEAD = """# Command reference

`docs/reference.py` writes this page from the program. Every command also prints its options with `--help`. An option that is a setting has the
same default in a recipe ([recipe reference](recipes.md)), unless the command names another default on this page.

"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def type_name(annotation: Any) -> str:
    """A field's type in words that a user of YAML knows."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        inner = tuple(part for part in inner if part is not int or float not in inner)  # an integer is a number
        return " or ".join(dict.fromkeys("null" if part is type(None) else type_name(part) for part in inner))
    if origin is tuple and ... not in inner:
        return f"list of {len(inner)} ({', '.join(type_name(part) for part in inner)})"
    if origin in (tuple, list):
        return f"list of {type_name(inner[0])}"
    if origin is dict:
        return "map"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def metadata(info: FieldInfo) -> Iterator[Any]:
    """A field's limits, those inside Annotated and unions included."""
    yield from info.metadata

    def inside(annotation: Any) -> Iterator[Any]:
        for extra in getattr(annotation, "__metadata__", ()):
            yield from getattr(extra, "metadata", [extra])
        for part in typing.get_args(annotation):
            yield from inside(part)

    yield from inside(info.annotation)


def limits(info: FieldInfo) -> str:
    signs: list[tuple[type[Any], str, str]] = [(Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<")]
    found = [
        f"{sign} {shown(getattr(m, name))}" for m in metadata(info) for kind, name, sign in signs if isinstance(m, kind)
    ]
    return ", ".join(dict.fromkeys(found))


def settings_kind(annotation: Any) -> type[Settings] | None:
    """The settings class that a field holds, also where the field may be null."""
    parts = [annotation, *typing.get_args(annotation)]
    return next((p for p in parts if isinstance(p, type) and issubclass(p, Settings)), None)


def shown(value: Any) -> str:
    if value is None:
        return "null"
    if value is True or value is False:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    if value == "":
        return "(empty)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows(kind: type[Settings], given: Settings | None, prefix: str) -> Iterator[str]:
    """A table row for each key. given: the settings that the default holds."""
    for name, info in kind.model_fields.items():
        default = info.get_default(call_default_factory=True) if given is None else getattr(given, name)
        inner = settings_kind(info.annotation)
        if inner is not None:
            if default is None:
                yield f"| `{prefix}{name}` | section or null | null | {cell(info.description or inner.__doc__ or '')} |"
                default = None
            yield from rows(inner, default if isinstance(default, Settings) else None, f"{prefix}{name}.")
            continue
        bounds = limits(info)
        about = f"{type_name(info.annotation)}{', ' + bounds if bounds else ''}"
        value = "(needed)" if default is PydanticUndefined else f"`{shown(default)}`"
        yield f"| `{prefix}{name}` | {cell(about)} | {cell(value)} | {cell(info.description or '')} |"


def working_stages() -> list[Stage]:
    """All stages but those that only hold a section of the recipe for another stage."""
    return [stage for stage in all_stages() if stage.needs or stage.uses or stage.makes]


HEADER = "| key | value | default | meaning |\n|---|---|---|---|"


def recipe_page() -> str:
    out = [RECIPES_HEAD]
    fields = Recipe.model_fields
    plain = {name: info for name, info in fields.items() if settings_kind(info.annotation) is None}
    out.append(f"## Keys at the top level\n\n{HEADER}")
    for name, info in plain.items():
        bounds = limits(info)
        default = info.get_default(call_default_factory=True)
        value = "(needed)" if default is PydanticUndefined else f"`{shown(default)}`"
        about = f"{type_name(info.annotation)}{', ' + bounds if bounds else ''}"
        out.append(f"| `{name}` | {cell(about)} | {cell(value)} | {cell(info.description or '')} |")
    out.append(f"\n{NOTES['']}")
    for name, info in fields.items():
        kind = settings_kind(info.annotation)
        if kind is None:
            continue
        default = info.get_default(call_default_factory=True)
        readers = [f"`{s.name}`" for s in working_stages() if s.part == name]
        out.append(f"\n## `{name}`\n\n{info.description or ''}")
        if readers:
            kind_of = "optional section" if default is None else "section"
            out.append(f"\nStages that read this {kind_of}: {', '.join(readers)}.")
        if name in NOTES:
            out.append(f"\n{NOTES[name]}")
        out.append(f"\n{HEADER}")
        out.extend(rows(kind, default if isinstance(default, Settings) else None, ""))
    out.append("\n## Stages and their order\n")
    out.append(
        "A run works through its stages in this order. The order follows from the artifacts that each stage needs. A stage"
    )
    out.append(
        'also takes the artifacts of the column "takes too", if the run has them. [Artifacts](extending.md#how-stages-give-each-other-their-results)'
    )
    out.append("says what each one holds.\n")
    out.append("| stage | section | needs | takes too | makes |\n|---|---|---|---|---|")
    for stage in working_stages():
        also = [artifact for artifact in stage.uses if artifact not in stage.needs]
        columns = [", ".join(a.name for a in group) for group in (stage.needs, also, stage.makes)]
        out.append(f"| `{stage.name}` | {f'`{stage.part}`' if stage.part else ''} | {' | '.join(columns)} |")
    out.append("\n## The shipped recipes\n")
    for name, path in builtin_recipes().items():
        text = path.read_text(encoding="utf-8").strip()
        out.append(f"### `{name}`\n\n```yaml\n{text}\n```\n")
    return "\n".join(out).rstrip() + "\n"


def option_row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    needed = parameter.required
    default = None if callable(parameter.default) else parameter.default
    value = "(needed)" if needed else "" if default in (None, (), []) else f"`{shown(default)}`"
    about = getattr(parameter, "help", None) or ""
    if variable := getattr(parameter, "envvar", None):
        about += f" Environment: `{variable if isinstance(variable, str) else variable[0]}`."
    return f"| {names} | {cell(value)} | {cell(about)} |"


def commands(command: Any, path: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")
        return
    yield f"## `{path}`\n\n{inspect.cleandoc(command.help or '')}\n"
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    for argument in arguments:
        yield f"Argument `{argument.name.upper()}`{': ' + argument.help if getattr(argument, 'help', None) else ''}\n"
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    if options:
        yield "| option | default | meaning |\n|---|---|---|"
        yield from map(option_row, options)
    yield ""


def command_page() -> str:
    return COMMANDS_HEAD + "\n".join(commands(typer.main.get_command(app), "solon")).rstrip() + "\n"


def pages() -> dict[Path, str]:
    return {PAGES / "recipes.md": recipe_page(), PAGES / "commands.md": command_page()}


if __name__ == "__main__":
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(pages()[path], encoding="utf-8")
        print(path, file=sys.stderr)
    sys.exit(1 if stale and "--check" in sys.argv else 0)
