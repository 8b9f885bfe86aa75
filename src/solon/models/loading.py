"""A model directory is looked at before it is loaded, and what was loaded is looked at before it is used.

transformers fills a tensor that a file lacks with random numbers, leaves out one that it does not know, and follows an index
wherever it leads. Here each of these is one line that names the file or the tensor: the same directory always gives the same
model, and nothing is opened but safetensors, JSON and text inside the directory.
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
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JSON_FILES = (
    CONFIG, INDEX, ADAPTER_CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip
LARGEST_JSON = 256 << 20  # bytes; the largest tokenizers have 35 MB
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Buffers that older versions of transformers wrote with the weights, and newer ones compute.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)$")


def check_directory(where: Path) -> None:
    """Raises InputError where a file of a model directory is damaged, or leads out of it. Reads headers, no weights."""
    looked_at = [p for p in sorted(where.iterdir()) if p.name in JSON_FILES or p.suffix == ".safetensors"]
    stats = [(p.name, s.st_size, s.st_mtime_ns) for p in looked_at if p.is_file() and (s := p.stat())]
    _checked(where, tuple(stats))


@functools.lru_cache(maxsize=64)
def _checked(where: Path, stats: tuple[tuple[str, int, int], ...]) -> None:
    """The same, once as long as the files stay what they are."""
    for name in JSON_FILES:
        if (where / name).is_symlink() or (where / name).exists():
            read_json(_inside(where, where / name))
    if (where / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"{where}: holds a whole model and an adapter ({ADAPTER_CONFIG}) too; move one of them elsewhere"
        )
    config = read_json(where / CONFIG)
    tensors = {name for path in weight_files(where) for name in tensor_shapes(path)}
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in LAYERS:
            layers = part.get(name)
            if isinstance(layers, int) and layers > max(len(tensors), 1):  # and its modules would be made first
                raise InputError(
                    f"{where / CONFIG}: says {layers} layers ({name}); the weights hold {len(tensors)} tensors"
                )


def read_json(path: Path) -> dict[str, Any]:
    """Raises InputError where the file is not one JSON object."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise InputError(f"{path}: larger than {LARGEST_JSON >> 20} MB; no file of a model is")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({printable(str(error), 120)}); is the file whole?") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def weight_files(where: Path) -> list[Path]:
    """The safetensors files that hold a model's weights: those of its index, or the one. Raises InputError."""
    if not (where / INDEX).is_file() or (where / WEIGHTS).is_file():
        return [_inside(where, where / WEIGHTS)]
    index = where / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: has no weight_map that names the file of each tensor")
    files = []
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f'{index}: names "{printable(name, 120)}"; expected a .safetensors file in the same directory'
            )
        path = _inside(where, where / name)
        absent = {tensor for tensor, file in places.items() if file == name} - tensor_shapes(path).keys()
        if absent:
            raise InputError(f"{path}: lacks {join_names(absent)}, which {INDEX} places there")
        files.append(path)
    return files


def _inside(where: Path, path: Path) -> Path:
    """The path. Raises InputError where it is no regular file, or a link that leads out of the directory."""
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
    """`kind.from_pretrained(where)`, believed only where every tensor came from the file and is finite.

    new: tensors that the file may lack, since training begins with them. extra: prefixes of tensors that the model may
    leave out. Remote code stays off; weights come from safetensors only. Raises InputError, naming the tensors.
    """
    check_directory(Path(where))
    model, found = explain_errors(
        f"{where}: the model cannot be loaded",
        lambda: kind.from_pretrained(
            str(where),
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            **options,  # told in the loading info, with names
        ),
    )
    check_loading_info(where, found, new=new, extra=extra)
    check_finite(model, str(where))
    return model


def check_loading_info(
    where: str | Path, found: Any, *, new: Collection[str] = (), extra: Collection[str] = ()
) -> None:
    """Raises InputError where a file and its model do not hold the same tensors. found: transformers' loading info."""
    wrong = found.get("mismatched_keys") or ()
    if wrong:
        first = next(iter(wrong))
        name, *shapes = (first,) if isinstance(first, str) else first
        shown = f" (has {list(shapes[0])}, expected {list(shapes[1])})" if len(shapes) == 2 else ""
        raise InputError(f"{where}: {len(wrong)} of its tensors are of another shape than {CONFIG} says: {name}{shown}")
    unknown = {n for n in found["unexpected_keys"] if not COMPUTED.search(n) and not n.startswith(tuple(extra))}
    missing = set(found["missing_keys"]) - set(new)
    if not missing and not unknown:
        return
    told = [f"lack {join_names(missing)}"] if missing else []
    told += [f"hold {join_names(unknown)}, which this kind of model does not have"] if unknown else []
    raise InputError(
        f"{where}: the weights {' and '.join(told)}{_renamed(missing, unknown)}; nothing is made up for them"
    )


def _renamed(missing: Collection[str], unknown: Collection[str]) -> str:
    """Where the names differ by a prefix alone, as after torch.compile: what to rename."""
    for name in sorted(missing):
        longer = [u for u in unknown if u.endswith("." + name)]
        prefix = longer[0].removesuffix(name) if longer else ""
        if prefix and all(u.removeprefix(prefix) in missing for u in unknown):
            return f' (their names begin with "{prefix}": save the model without it)'
    return ""


def join_names(names: Collection[str], most: int = 3) -> str:
    """The names in order, and how many more there are."""
    shown = ", ".join(printable(n, 100) for n in sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def explain_errors(what: str, work: Callable[[], T]) -> T:
    """The result of `work`. What goes wrong in others' code while it reads a user's files becomes one InputError.

    What the machine did (a full disk, no memory, no permission) is left as it is.
    """
    try:
        return work()
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise InputError(f"{what} ({_said(error)})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a library written in Rust that met what it did not expect
            raise
        raise InputError(f"{what} ({_said(error)})") from None


def _said(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return printable(f"{type(error).__name__}: {first}" if first else type(error).__name__, 200)


def check_finite(model: Any, what: str) -> None:
    """Raises InputError where a weight holds a number that is not finite, naming the tensor."""
    bad = not_finite(model.state_dict().items())
    if bad:
        raise InputError(f"{what}: not every number in its weights is finite: {join_names(bad)}")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold an infinity or no number at all."""
    return [name for name, tensor in tensors if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # eight bits: torch has no minimum of these
        tensor = tensor.float()
    least, most = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))
