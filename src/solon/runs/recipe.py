"""A recipe: everything a run is made of, in one typed file.

RLHF, RLAIF, Constitutional AI and the hybrid are recipes of one pipeline. A part that is left out is a stage that
is skipped. Defaults stand here, each with its unit; an unknown key is an error that names the nearest right one.
"""

from __future__ import annotations

import io
import typing
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from solon.engines.local import DEFAULT_SYSTEM
from solon.engines.sampling import SamplingSettings
from solon.errors import InputError, nearest, printable, quoted
from solon.feedback.judge import JudgeSettings
from solon.models.lora import AdapterSettings
from solon.reinforcement.alternatives import Algorithm, check_settings
from solon.reinforcement.reward_model import RewardSettings
from solon.reinforcement.trainer import PPOSettings
from solon.runs.trackers import check_trackers
from solon.settings import SeedNumber, Settings
from solon.supervised import SAMPLING
from solon.training.loop import TrainSettings
from solon.yaml_text import Where, YamlText, read_bytes


class Part(Settings):
    """A part of a recipe."""


class RevisionSampling(SamplingSettings):
    """As `solon critique` samples."""

    max_tokens: int = Field(SAMPLING.max_tokens, ge=1)
    temperature: float = Field(SAMPLING.temperature, ge=0)
    top_p: float = Field(SAMPLING.top_p, gt=0, le=1)
    repetition_penalty: float = Field(SAMPLING.repetition_penalty, gt=0)


class Prompts(Part):
    """Files or shipped names (solon:…). The numbers take the first so many of each; null takes all.

    Where the held-out prompts are not named: of a shipped set those that ship with it; of a file of yours a share of it,
    drawn by the seed and kept out of training.
    """

    red_team: str = "solon:red-team"
    helpful: str = "solon:helpful"
    heldout_red_team: str | None = None
    heldout_helpful: str | None = None
    heldout_share: float = Field(0.2, gt=0, le=0.5)  # of the different prompts of a file of yours
    n_red_team: int | None = Field(None, ge=0)
    n_helpful: int | None = Field(None, ge=0)
    n_heldout: int | None = Field(None, ge=1)  # of each kind


class Human(Part):
    """What people wrote and chose. The shipped sets stand where a user's own data goes."""

    demonstrations: tuple[str, ...] = ()
    revision_demonstrations: str | None = None  # revision chains that teach how to criticise and revise
    comparisons: tuple[str, ...] = ()
    heldout_comparisons: int = Field(60, ge=0)  # kept away from all training, to measure on
    n_demonstrations: int | None = Field(None, ge=1)
    n_comparisons: int | None = Field(None, ge=2)
    validation_sample: int = Field(0, ge=0)  # AI comparisons drawn for people to check


class Warmup(Part):
    """SFT of the start model on human demonstrations, before anything else."""

    train: TrainSettings = TrainSettings()
    adapter: AdapterSettings | None = None  # instead of the recipe's: a small model needs all its layers to learn this


class Supervised(Part):
    revisions: int = Field(2, ge=1, le=5)
    critique: bool = True  # false: direct revisions
    few_shot: int | None = Field(None, ge=0)  # of a principle's examples, before each request; null: all, 0: none
    responder: Literal["self", "start"] = "self"  # who writes the first response: the warmed-up or the start model
    sampling: RevisionSampling = RevisionSampling()
    sft_on: Literal["final", "all", "best"] = "final"  # best: the judge chooses between response and last revision
    demonstration_share: float = Field(0.25, ge=0, lt=1)  # of the SFT set, so that nothing is forgotten
    train: TrainSettings = TrainSettings()


class Feedback(JudgeSettings):
    labels: Literal["ai", "human", "both"] = "ai"
    judge: str = "self"  # self: the model in training; or anything --model takes
    warmup: TrainSettings | None = None  # fine-tune the judge on the human comparisons first
    adapter: AdapterSettings | None = (
        None  # for that, instead of the recipe's: judging is learned in the lower layers too
    )
    direct: bool = False  # direct RLAIF: the judge's rating, 1 to 10, is PPO's reward; no reward model is trained
    n_prompts: int | None = Field(None, ge=1)
    sampling: SamplingSettings = SamplingSettings(temperature=1.0)

    def judging(self) -> JudgeSettings:
        return JudgeSettings.model_validate({name: getattr(self, name) for name in JudgeSettings.model_fields})


class RewardModelPart(Part):
    train: RewardSettings = RewardSettings()
    heldout_ai: float = Field(0.15, ge=0, lt=1)  # share of the AI comparisons kept to measure on


class GoldPart(Part):
    """Who checks PPO while it runs, every ppo.check_every updates: see reinforcement/monitors.py."""

    judge: str | None = None  # anything --model takes; null: the judge of the feedback
    probes: int = Field(32, ge=2)  # training prompts that are answered again and again, half of them red-team


class Evaluation(Part):
    sampling: SamplingSettings = SamplingSettings()
    judge_comparisons: int = Field(48, ge=0)  # pairs a model against the start model


class Recipe(Part):
    name: str
    description: str = ""
    seed: SeedNumber = 0
    model: str = "smollm2"
    constitution: str = "solon"
    system: str | None = DEFAULT_SYSTEM  # null sends none
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of models that generate or judge
    training_dtype: Literal["auto", "float32", "bfloat16"] | None = None  # of models that learn; null: as dtype
    batch_size: int = Field(64, ge=1)  # prompts worked on together; a killed run repeats at most one such batch
    adapter: AdapterSettings | None = AdapterSettings()  # null trains all weights
    prompts: Prompts = Prompts()
    human: Human = Human()
    warmup: Warmup | None = None
    supervised: Supervised | None = None
    feedback: Feedback = Feedback()
    reward_model: RewardModelPart = RewardModelPart()
    algorithm: Algorithm = "ppo"  # or TRL's rloo, grpo, dpo on the same data and reward, with ppo's settings
    ppo: PPOSettings = PPOSettings()
    gold: GoldPart = GoldPart()
    report_to: tuple[str, ...] = ()  # trackers beside TensorBoard: wandb, trackio, mlflow …
    evaluation: Evaluation = Evaluation()

    def models(self) -> dict[str, str]:
        """Every model that the recipe names, by its key."""
        named = {"model": self.model}
        if self.feedback.judge != "self" and self.feedback.labels != "human":
            named["feedback.judge"] = self.feedback.judge
        if self.gold.judge is not None:
            named["gold.judge"] = self.gold.judge
        return named

    @property
    def learning_dtype(self) -> str:
        """The dtype of models that learn."""
        return self.training_dtype or self.dtype

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.warmup and not (self.human.demonstrations or self.human.revision_demonstrations):
            raise ValueError("warmup needs human.demonstrations or human.revision_demonstrations to learn from")
        if self.feedback.labels != "ai" and not self.human.comparisons:
            raise ValueError(f"feedback.labels: {self.feedback.labels} needs human.comparisons")
        if self.feedback.warmup and not self.human.comparisons:
            raise ValueError("feedback.warmup needs human.comparisons to learn from")
        if self.feedback.warmup and self.feedback.judge.startswith(("server:", "systemone:", "decision:")):
            raise ValueError("feedback.warmup fine-tunes a local model; remove it, or the server or decision judge")
        if self.feedback.direct and self.feedback.labels != "ai":
            raise ValueError(f"feedback.direct: the reward is the judge's; labels: {self.feedback.labels} go to none")
        if self.feedback.few_shot and not self.human.comparisons:
            raise ValueError("feedback.few_shot needs human.comparisons to take its examples from")
        if self.supervised and self.supervised.sft_on == "best" and self.feedback.labels == "human":
            raise ValueError("supervised.sft_on: best needs a judge, and feedback.labels: human has none")
        if self.adapter is None:
            raise ValueError("ppo needs adapter: the reference model is the policy without it")
        if self.algorithm == "dpo" and self.feedback.direct:
            raise ValueError("algorithm: dpo learns from comparisons, and feedback.direct makes none")
        if self.feedback.direct and self.ppo.value_start == "reward-model":
            raise ValueError("ppo.value_start: reward-model, and feedback.direct trains none; set it to zero")
        try:
            check_settings(self.algorithm, self.ppo)
            check_trackers(self.report_to)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self


def builtin_recipes() -> dict[str, Path]:
    folder = Path(str(files("solon"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or a file. overrides: dotted keys to values, which win over the file's.

    Raises InputError: one line that begins with FILE:LINE, or with the override that is wrong.
    """
    path = builtin_recipes().get(name) or Path(name).expanduser()
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        known = list(builtin_recipes())
        names = ", ".join(known)
        raise InputError(f"no recipe and no file is named {quoted(name)}; the recipes are {names}{nearest(name, known)}") from None  # fmt: skip
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {quoted(name)}: {why}; give a recipe's file or name") from None
    source = YamlText.of_bytes(data, str(path), what="recipe", a_few="keys", expected="keys such as name: and model:")
    values = source.read()
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        at, where = _at(source, first["loc"], overrides or {}), printable(".".join(map(str, first["loc"])), 120)
        raise InputError(f"{at}: {_wrong(first, '' if at == f'--set {where}' else where)}") from error


def _wrong(error: Any, where: str) -> str:
    """What is wrong with a recipe, for one of pydantic's errors. where: the key, unless it has been said."""
    if error["type"] == "extra_forbidden":
        key = ".".join(str(x) for x in error["loc"])
        return f"unknown key {quoted(key)}{nearest(str(error['loc'][-1]), _keys(error['loc'][:-1]))}"
    message = printable(error["msg"].removeprefix("Value error, "))
    if error["type"] == "string_type":
        message = f"expected a text; put quotes around {quoted(str(error['input']))[1:-1]}"
    elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"expected keys with values; the keys here are {', '.join(_keys(error['loc']))}"
    elif error["type"] == "tuple_type":
        message = "expected a list, such as [a, b]"
    return f"{where + ': ' if where else ''}{message[:1].lower() + message[1:]}"


def _at(source: YamlText, loc: Where, overrides: dict[str, Any]) -> str:
    """The place of an error: the override that set it, or file and line of the deepest part of `loc` in the file."""
    dotted = ".".join(str(x) for x in loc)
    for key in overrides:
        if f"{dotted}.".startswith(f"{key}.") or (key.startswith(f"{dotted}.") and loc not in source.places):
            return f"--set {key}"
    return f"{source.file}:{source.line(source.place(loc).key)}"


def dump_recipe(recipe: Recipe) -> str:
    """A file that loads back to an equal recipe."""
    stream = io.StringIO()
    YAML(pure=True).dump(_writable(recipe.model_dump(mode="json")), stream)
    return stream.getvalue()


def _writable(node: Any) -> Any:
    """The same for the YAML writer: a text with line breaks or control characters goes into double quotes, escaped."""
    if isinstance(node, dict):
        return {k: _writable(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_writable(v) for v in node]
    return DoubleQuotedScalarString(node) if isinstance(node, str) and not node.isprintable() else node


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    kind: Any = Recipe
    for key in loc:
        field = kind.model_fields.get(key) if hasattr(kind, "model_fields") else None
        if field is None:
            return []
        options = [field.annotation, *typing.get_args(field.annotation)]
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(kind.model_fields) if kind else []
