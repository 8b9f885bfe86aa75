"""Checks of a model directory before it is loaded, and of the model after it is loaded.

transformers fills a missing tensor with random numbers, drops a tensor that it does not know, and follows an index to any
path. Here each of these is an error in one line that names the file or the tensor. So one directory always gives the same
model, and Solon opens only safetensors, JSON and text inside the directory.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from solon.errors import InputError, printable

T = TypeVar("T")
FileStats = tuple[tuple[str, int, int], ...]
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JSON_FILES = (
    CONFIG, INDEX, ADAPTER_CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
LARGEST_JSON = 256 << 20  # bytes; the largest tokenizers have 35 MB
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Buffers that older versions of transformers wrote with the weights, and newer versions compute.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")


def check_directory(where: Path) -> None:
    """Raises InputError where a file of a model directory is damaged or leads out of it. Reads headers, not weights."""
    _check_files(where, file_stats(where))


def file_stats(where: Path) -> FileStats:
    """Name, size in bytes and time of change in ns of the files in a model directory that transformers may read."""
    files = [p for p in sorted(where.iterdir()) if p.name in JSON_FILES or p.suffix == ".safetensors"]
    return tuple((p.name, s.st_size, s.st_mtime_ns) for p in files if p.is_file() and (s := p.stat()))


@functools.lru_cache(maxsize=64)
def _check_files(where: Path, stats: FileStats) -> None:
    """The check runs again only when the stats of a file change."""
    for name in JSON_FILES:
        if (where / name).is_symlink() or (where / name).exists():
            read_json(_inside(where, where / name))
    if (where / ADAPTER_CONFIG).is_file():
        raise InputError(f"{where}: holds a whole model and an adapter ({ADAPTER_CONFIG}) too; move one elsewhere")
    config = read_json(where / CONFIG)
    tensors = {name for path in weight_files(where) for name in tensor_shapes(path)}
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in LAYERS:
            layers = part.get(name)
            if isinstance(layers, int) and layers > max(len(tensors), 1):  # transformers would first build all layers
                raise InputError(
                    f"{where / CONFIG}: {layers} layers ({name}), but the weights hold {len(tensors)} tensors"
                )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where the file holds anything else."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise InputError(f"{path}: larger than {LARGEST_JSON >> 20} MB; no JSON file of a model is so large")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({printable(str(error), 120)}); is the file whole?") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def weight_files(where: Path) -> list[Path]:
    """The safetensors files of a model's weights: the files of its index, or the single file. Raises InputError."""
    index = where / INDEX
    if not index.is_file() or (where / WEIGHTS).is_file():
        return [_inside(where, where / WEIGHTS)]
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise InputError(f"{index}: has no weight_map that names the file of each tensor")
    files = []
    for name in sorted(set(file_of.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f'{index}: names "{printable(name, 120)}"; expected a .safetensors file in this directory')
        path = _inside(where, where / name)
        if absent := {tensor for tensor, file in file_of.items() if file == name} - tensor_shapes(path).keys():
            raise InputError(f"{path}: lacks {join_names(absent)}, which {INDEX} says is in this file")
        files.append(path)
    return files


def _inside(where: Path, path: Path) -> Path:
    """The path. Raises InputError where it is not a regular file, or is a link that leads out of the directory."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (or not a regular one)")
    target, home = path.resolve(), where.resolve()
    store = home.parents[1] if home.parent.name == "snapshots" else home  # the hub's cache: snapshots/REV → ../../blobs
    if path.is_symlink() and not (target.is_relative_to(home) or target.is_relative_to(store / "blobs")):
        raise InputError(f"{path}: a link that leads out of the model's directory, to {target}")
    return path


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors. Raises InputError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(100)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer and not the weights; run: git lfs pull")
    if len(start) < 8:
        raise InputError(f"{path}: {'empty' if not start else 'cut short'}; not a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({printable(str(error), 160)})") from None


def load_checked(
    kind: Any, where: str, *, new: Collection[str] = (), extra: Collection[str] = (), **options: Any
) -> Any:
    """`kind.from_pretrained(where)`, where every tensor comes from the files and is finite.

    new: tensors that the files may lack, because training begins with them. extra: prefixes of tensors that the model may leave
    out. Remote code stays off; weights come from safetensors only. Raises InputError, which names the tensors.
    """
    check_directory(Path(where))
    model, loading_info = explain_errors(
        f"{where}: the model cannot be loaded",
        lambda: kind.from_pretrained(
            str(where),
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the loading info names them
            **options,
        ),
    )
    check_loading_info(where, loading_info, new=new, extra=extra)
    check_finite(model, str(where))
    return model


def check_loading_info(where: str | Path, info: Any, *, new: Collection[str] = (), extra: Collection[str] = ()) -> None:
    """Raises InputError where a model and its files do not hold the same tensors. info: transformers' loading info."""
    if mismatched := info.get("mismatched_keys") or ():
        first = next(iter(mismatched))
        name, *shapes = (first,) if isinstance(first, str) else first
        shown = f" (has {list(shapes[0])}, expected {list(shapes[1])})" if len(shapes) == 2 else ""
        raise InputError(f"{where}: {len(mismatched)} tensors have another shape than {CONFIG} says: {name}{shown}")
    unknown = {n for n in info["unexpected_keys"] if not COMPUTED.search(n) and not n.startswith(tuple(extra))}
    missing = set(info["missing_keys"]) - set(new)
    faults = [f"lack {join_names(missing)}"] if missing else []
    faults += [f"hold {join_names(unknown)}, which this kind of model does not have"] if unknown else []
    if faults:
        raise InputError(f"{where}: the weights {' and '.join(faults)}{_prefix_hint(missing, unknown)}")


def _prefix_hint(missing: Collection[str], unknown: Collection[str]) -> str:
    """A hint on renaming, where the names differ by a prefix alone, as after torch.compile."""
    for name in sorted(missing):
        longer = [u for u in unknown if u.endswith("." + name)]
        prefix = longer[0].removesuffix(name) if longer else ""
        if prefix and all(u.removeprefix(prefix) in missing for u in unknown):
            return f' (their names begin with "{prefix}": save the model without it)'
    return ""


def join_names(names: Collection[str], most: int = 3) -> str:
    """The first names in order, and the number of the others."""
    shown = ", ".join(printable(name, 100) for name in sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def explain_errors(failure: str, work: Callable[[], T]) -> T:
    """The result of `work`, which lets a library read a user's files. An error of the library becomes an InputError.

    failure: the beginning of the error message. Errors of the machine (a full disk, no memory, no permission) are raised as they are.
    """
    try:
        return work()
    except InputError:
        raise
    except BaseException as error:
        of_machine = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        # PanicException: a library written in Rust met a state that it did not expect. It is not an Exception.
        if of_machine or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise InputError(f"{failure} ({printable(reason, 200)})") from error


def check_finite(model: Any, name: str) -> None:
    """Raises InputError where a weight holds a number that is not finite, and names the tensor."""
    if bad := not_finite(model.state_dict().items()):
        raise InputError(f"{name}: not every number in its weights is finite: {join_names(bad)}")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold an infinity or nan."""
    return [name for name, tensor in tensors if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # torch has no minimum of eight-bit floats
        tensor = tensor.float()
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
