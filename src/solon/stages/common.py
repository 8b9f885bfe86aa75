"""The keys of a recipe that belong to no single stage: the model, the seed, the data."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import Field

from solon.models.settings import AdapterSettings
from solon.settings import DEFAULT_SYSTEM, SeedNumber, Settings

S = TypeVar("S", bound=Settings)
Dtype = Literal["auto", "float32", "bfloat16"]


class Prompts(Settings):
    """Prompt files, or shipped sets (`solon:…`).

    Where the held-out prompts are not named, they are those that ship with a shipped set; of a file of yours, a share of
    its prompts is drawn by the seed and kept out of training.
    """

    red_team: str = "solon:red-team"
    """Prompts that ask for something harmful."""
    helpful: str = "solon:helpful"
    """Prompts that ask for something harmless."""
    heldout_red_team: str | None = None
    """Red-team prompts that the models are measured on."""
    heldout_helpful: str | None = None
    """Helpful prompts that the models are measured on."""
    heldout_share: float = Field(0.2, gt=0, le=0.5)
    """Share of the different prompts of a file of yours that is held out, where no held-out file is named."""
    n_red_team: int | None = Field(None, ge=0)
    """How many of the red-team prompts to train on, from the front of an order drawn by the seed; null: all."""
    n_helpful: int | None = Field(None, ge=0)
    """The same for helpful prompts."""
    n_heldout: int | None = Field(None, ge=1)
    """How many held-out prompts of each kind; null: all."""


class Human(Settings):
    """What people wrote and chose. The shipped sets stand where a user's own data goes."""

    demonstrations: tuple[str, ...] = ()
    """Files of conversations in which people show how to answer."""
    revision_demonstrations: str | None = None
    """A file of revision chains in which people show how to criticise and revise."""
    comparisons: tuple[str, ...] = ()
    """Files of comparisons that people labelled."""
    heldout_comparisons: int = Field(60, ge=0)
    """How many comparisons are kept out of all training, to measure the judge and the reward model on."""
    n_demonstrations: int | None = Field(None, ge=1)
    """How many demonstrations (and as many revision demonstrations) to use; null: all."""
    n_comparisons: int | None = Field(None, ge=2)
    """How many comparisons to use; null: all."""
    validation_sample: int = Field(0, ge=0)
    """How many of the AI's comparisons are drawn for people to check."""


class Common(Settings):
    """The keys of every recipe. `runs/recipe.py` adds one for each stage's settings."""

    name: str
    """What the recipe is called."""
    description: str = ""
    """What the recipe does, in a sentence."""
    seed: SeedNumber = 0
    """Seed of everything random."""
    model: str = "smollm2"
    """The model to start from: smollm2, a directory, a .gguf file or a hub id."""
    constitution: str = "solon"
    """A built-in constitution (solon, simple, bank) or a file."""
    system: str | None = DEFAULT_SYSTEM
    """The system message of every conversation; null sends none."""
    dtype: Dtype = "auto"
    """Dtype of models that generate or judge; auto takes the one that is faster on this machine."""
    training_dtype: Dtype | None = None
    """Dtype of models that learn; null: as `dtype`."""
    batch_size: int = Field(64, ge=1)
    """Prompts that are worked on together. A killed run computes at most one such batch again."""
    adapter: AdapterSettings | None = AdapterSettings()
    """LoRA adapters of every training that has none of its own; null trains all weights."""
    prompts: Prompts = Prompts()
    """The prompts: those that are trained on, and those that the models are measured on."""
    human: Human = Human()
    """What people wrote and chose."""
    algorithm: str = "ppo"
    """The reinforcement algorithm: ppo, or TRL's rloo, grpo, dpo. Each has its own settings under its own name."""
    report_to: tuple[str, ...] = ()
    """Trackers beside TensorBoard: wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive, swanlab."""

    @property
    def learning_dtype(self) -> str:
        """The dtype of models that learn."""
        return self.training_dtype or self.dtype

    def find(self, kind: type[S]) -> S | None:
        """The recipe's settings of this kind; None where the recipe leaves them out."""
        return next((v for name in type(self).model_fields if isinstance(v := getattr(self, name), kind)), None)

    def of(self, kind: type[S]) -> S:
        """The recipe's settings of this kind, which it must have."""
        found = self.find(kind)
        if found is None:
            raise LookupError(f"the recipe has no {kind.__name__}")
        return found
