"""What the three training stages (SFT, reward model, PPO) share: settings, adapters, saving."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field


class TrainSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    epochs: int = Field(2, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    max_length: int = Field(512, ge=16)  # tokens; longer examples are cut


class AdapterSettings(BaseModel):
    """LoRA (Hu et al. 2021) on every linear layer of the top `layers` blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    layers: int | None = Field(None, ge=1)  # None: all. Fewer train faster: nothing below them needs a gradient


def lora_config(model: Any, settings: AdapterSettings, task: str) -> Any:
    from peft import LoraConfig

    count = model.config.get_text_config().num_hidden_layers
    layers = None if settings.layers is None else list(range(max(0, count - settings.layers), count))
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,  # dropout would make the policy that is trained another than the one that was sampled
        target_modules="all-linear" if layers is None else r".*layers\.(%s)\..*_proj" % "|".join(map(str, layers)),
        task_type=task,
    )


def add_adapters(model: Any, settings: AdapterSettings, task: str = "CAUSAL_LM") -> Any:
    """The model with trainable adapters (float32, whatever the trunk's dtype); all else is frozen."""
    from peft import get_peft_model

    return get_peft_model(model, lora_config(model, settings, task))


def save_merged(model: Any, tokenizer: Any, out: Path, base: str | None) -> None:
    """Write a complete model directory; a half-written one is never taken for whole.

    base: where the frozen weights came from. Adapters are merged into a float32 copy of them: a small change
    added to bfloat16 weights would be rounded away.
    """
    from peft import PeftModel

    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=_made(out.parent)))
    try:
        if base is not None:
            model.save_pretrained(aside / "adapter")
            kind = type(model.get_base_model())
            options = {"num_labels": 1} if "SequenceClassification" in kind.__name__ else {}
            whole = kind.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **options)
            whole.config.pad_token_id = tokenizer.pad_token_id
            model = PeftModel.from_pretrained(whole, str(aside / "adapter")).merge_and_unload()
            shutil.rmtree(aside / "adapter")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, out: Path) -> None:
    """Put a finished directory in its place: everything on disk first, then one rename."""
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    aside.chmod(0o755)
    if out.exists():
        shutil.rmtree(out)
    os.replace(aside, out)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
