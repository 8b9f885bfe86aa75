"""A trained model is written as one complete directory, with its adapters merged in float32."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from solon import distributed
from solon.errors import Diverged, InputError
from solon.models.forward import base_of
from solon.models.loading import join_names, load_checked, not_finite
from solon.models.lora import exact_names
from solon.models.sharding import is_sharded
from solon.publishing import new_directory, publish


def save_merged(
    model: Any, tokenizer: Any, out: Path, base: str | None, add_files: Callable[[Path], None] | None = None
) -> None:
    """Write a complete model directory. The directory appears as a whole or not at all.

    base: the directory of the frozen weights; None: the model has no adapters. add_files: writes further files into the
    new directory. Of several processes the main one writes, and the others wait. The model is used up. Raises Diverged
    where a weight is not finite.
    """
    if distributed.is_main():
        new = new_directory(out)
        try:
            if base is not None:
                model = _merge_adapter(model, tokenizer, base, new / "adapter")
            if bad := not_finite(model.state_dict().items()):
                raise Diverged(f"{out}: not written, because these weights are not finite: {join_names(bad)}")
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            if add_files:
                add_files(new)
            _publish_or_keep(new, out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    distributed.barrier()


def save_adapter(model: Any, path: Path) -> None:
    """Write the active adapter of a PEFT model. Two equal adapters are equal files."""
    config = model.peft_config[model.active_adapter]
    config.target_modules = sorted(config.target_modules)  # a set: its order differs from process to process
    model.save_pretrained(path)


def _merge_adapter(model: Any, tokenizer: Any, base: str, scratch: Path) -> Any:
    """The model with its adapter merged into float32 weights: a small change added to bfloat16 would be rounded away.

    scratch: a folder for the adapter, removed again; it serves where the model in memory cannot be merged in place.
    """
    from peft import PeftModel

    if base_of(model).dtype == torch.float32 and not is_sharded(model):
        return model.merge_and_unload()
    save_adapter(model, scratch)
    kind = type(model.get_base_model())
    options: dict[str, Any] = {}
    if "SequenceClassification" in kind.__name__:
        options = {"num_labels": 1, "new": ["score.weight"], "extra": ["lm_head."]}
    whole = load_checked(kind, base, dtype=torch.float32, **options)
    whole.config.pad_token_id = tokenizer.pad_token_id
    with exact_names():
        merged = PeftModel.from_pretrained(whole, str(scratch)).merge_and_unload()
    shutil.rmtree(scratch)
    return merged


def _publish_or_keep(new: Path, out: Path) -> None:
    """Put the finished model in its place. Where that fails, keep the model beside `out` and name its folder."""
    try:
        publish(new, out)
    except (InputError, OSError) as error:
        if not new.is_dir():  # the renames have begun, and the next start completes them
            raise
        kept = Path(tempfile.mkdtemp(prefix=f"{out.name}.finished-", dir=out.parent))
        os.rename(new, kept)
        advice = f"the finished model is kept in {kept}"
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}; {advice}", error.filename) from error
        raise InputError(f"{error}; {advice}") from error


def give_memory_back(*, cycles: bool = True) -> None:
    """Return freed memory to the system. glibc otherwise keeps it, and every step adds to what is kept.

    cycles: first look for objects that refer to each other, as those of a trained model do; that takes tenths of a second.
    """
    if cycles:
        gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)
