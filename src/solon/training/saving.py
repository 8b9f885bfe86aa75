"""A trained model is written as one complete directory, adapters merged in float32."""

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
    model: Any, tokenizer: Any, out: Path, base: str | None, also: Callable[[Path], None] | None = None
) -> None:
    """Write a complete model directory; a half-written one is never taken for whole.

    base: where the frozen weights came from. Adapters are merged into them, float32 ones in place (the model is used up),
    others, and where processes share the weights, in a float32 copy: a small change added to bfloat16 weights would be
    rounded away. also: writes what else belongs into the directory. Of several processes the first one writes.
    """
    if distributed.is_main():
        _save_merged(model, tokenizer, out, base, also)
    distributed.barrier()


def _save_merged(model: Any, tokenizer: Any, out: Path, base: str | None, also: Callable[[Path], None] | None) -> None:
    from peft import PeftModel

    aside = new_directory(out)
    try:
        if base is not None and base_of(model).dtype == torch.float32 and not is_sharded(model):
            model = model.merge_and_unload()
        elif base is not None:
            model.save_pretrained(aside / "adapter")
            kind = type(model.get_base_model())
            options: dict[str, Any] = {}
            if "SequenceClassification" in kind.__name__:
                options = {"num_labels": 1, "new": ["score.weight"], "extra": ["lm_head."]}
            whole = load_checked(kind, base, dtype=torch.float32, **options)
            whole.config.pad_token_id = tokenizer.pad_token_id
            with exact_names():
                model = PeftModel.from_pretrained(whole, str(aside / "adapter")).merge_and_unload()
            shutil.rmtree(aside / "adapter")
        if bad := not_finite(model.state_dict().items()):
            raise Diverged(f"{out}: not written, since not every number in its weights is finite: {join_names(bad)}")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if also:
            also(aside)
        _published_or_kept(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _published_or_kept(aside: Path, out: Path) -> None:
    """Put the finished model in its place; where that fails, keep it beside `out` and say where."""
    try:
        publish(aside, out)
    except (InputError, OSError) as error:
        if not aside.is_dir():  # it is on its way: the next start ends it
            raise
        kept = Path(tempfile.mkdtemp(prefix=f"{out.name}.finished-", dir=out.parent))
        os.rename(aside, kept)
        told = f"the finished model is kept in {kept}"
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}; {told}", error.filename) from error
        raise InputError(f"{error}; {told}") from error


def give_memory_back(*, cycles: bool = True) -> None:
    """Return freed memory to the system: glibc keeps what one step used and the next adds its own.

    cycles: look for objects that hold each other first, as a trained model's do; that takes tenths of a second.
    """
    if cycles:
        gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
