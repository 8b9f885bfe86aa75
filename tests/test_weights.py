"""A model directory gives the same model every time, or one line: what it lacks, and which file is damaged."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solon.errors import InputError
from solon.models.loading import check_directory
from solon.models.weights import load_causal_lm, load_tokenizer, resolve
from solon.records import user

META = {"format": "pt"}


@pytest.fixture
def model(tiny: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def weights(where: Path) -> dict[str, torch.Tensor]:
    return load_file(where / "model.safetensors")


def rewrite(where: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(weights(where)), where / "model.safetensors", metadata=META)


def refused(where: Path | str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        load_causal_lm(str(where), dtype="float32")
    assert "\n" not in str(error.value)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {k: v for k, v in w.items() if k != NORM}, r"lack model\.layers\.1\.input_layernorm\.weight"),
        (lambda w: w | {"model.layers.9.mlp.weight": torch.ones(2)}, r"hold model\.layers\.9\.mlp\.weight"),
        (lambda w: {"_orig_mod." + k: v for k, v in w.items()}, r'begin with "_orig_mod\."'),
        (lambda w: w | {NORM: torch.ones(33)}, r"another shape .*input_layernorm.*33"),
        (lambda w: w | {NORM: w[NORM] * math.nan}, r"not every number .* finite.*input_layernorm"),
        (lambda w: w | {NORM: torch.cat([w[NORM][1:], torch.tensor([math.inf])])}, r"finite.*input_layernorm"),
        (lambda w: {}, "lack|tensors"),
    ],
)
def test_the_tensors_are_those_of_the_model_and_finite(model: Path, change: Any, says: str) -> None:
    rewrite(model, change)
    refused(model, says)


def test_tied_weights_need_not_stand_twice(model: Path) -> None:
    assert "lm_head.weight" not in weights(model)
    load_causal_lm(str(model), dtype="float32")
    rewrite(
        model, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )  # older versions wrote it
    load_causal_lm(str(model), dtype="float32")


def test_a_reward_model_without_its_head_is_refused(tiny: str, tmp_path: Path) -> None:
    from solon.models.settings import AdapterSettings
    from solon.records import Comparison, assistant
    from solon.reinforcement.reward_members import NORMALISATION
    from solon.reinforcement.reward_model import RewardModel
    from solon.reinforcement.reward_training import train_reward_model
    from solon.reinforcement.settings import RewardSettings

    rows = [Comparison(id="a", prompt=(user("q"),), chosen=(assistant("a"),), rejected=(assistant("b"),), label=0.9)]
    out = tmp_path / "rm"
    train_reward_model(rows, tiny, out, settings=RewardSettings(), adapter=AdapterSettings(rank=2, alpha=2), system=None,
                       reference=[], dtype="float32")  # fmt: skip
    RewardModel.load(str(out), "float32")
    for broken, says in (
        (json.dumps({"mean": math.nan, "std": 1.0}), "finite"),
        (json.dumps({"mean": 0.0, "std": 0}), "finite"),
        (json.dumps({"members": [3]}), "members"),
        ("[1]", "JSON object"),
        ("{", "not JSON"),
    ):
        kept = (out / NORMALISATION).read_text()
        (out / NORMALISATION).write_text(broken)
        with pytest.raises(InputError, match=says):
            RewardModel.load(str(out), "float32")
        (out / NORMALISATION).write_text(kept)
    rewrite(out, lambda w: {k: v for k, v in w.items() if k != "score.weight"})
    with pytest.raises(InputError, match=r"lack score\.weight"):
        RewardModel.load(str(out), "float32")


def shard(where: Path, name: str = "model-1.safetensors") -> dict[str, Any]:
    """Turns the weights into one named by an index."""
    places = dict.fromkeys(weights(where), name)
    (where / "model.safetensors").rename(where / "model-1.safetensors")
    (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_an_index_leads_to_safetensors_in_the_directory_and_nowhere_else(model: Path, tmp_path: Path) -> None:
    shard(model)
    load_causal_lm(str(model), dtype="float32")
    shutil.copy(model / "model-1.safetensors", tmp_path / "elsewhere.safetensors")
    (model / "weights.bin").write_bytes((model / "model-1.safetensors").read_bytes())
    (model / "linked.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    os.mkfifo(model / "pipe.safetensors")
    for name, says in (
        ("weights.bin", r"weights\.bin"),
        ("../elsewhere.safetensors", "elsewhere"),
        (str(tmp_path / "elsewhere.safetensors"), "elsewhere"),
        ("linked.safetensors", "leads out"),
        ("absent.safetensors", "no such file"),
        ("pipe.safetensors", "no such file"),
        ("model-1.safetensors\n", "names"),
        ("", "names"),
        (7, "weight_map"),
    ):
        places = dict.fromkeys(weights_of(model), name)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        refused(model, says)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000):
        (model / "model.safetensors.index.json").write_text(text)
        refused(model, "index")


def weights_of(where: Path) -> dict[str, torch.Tensor]:
    return load_file(where / "model-1.safetensors")


def test_a_link_within_the_hub_s_cache_is_followed(tiny: str, tmp_path: Path) -> None:
    """snapshots/REV/model.safetensors → ../../blobs/HASH"""
    where, blobs = tmp_path / "models--o--n/snapshots/abc", tmp_path / "models--o--n/blobs"
    where.mkdir(parents=True)
    blobs.mkdir()
    for path in Path(tiny).iterdir():
        shutil.copy(path, blobs / path.name)
        (where / path.name).symlink_to(Path("../../blobs") / path.name)
    load_causal_lm(str(where), dtype="float32")


def test_a_pickle_beside_the_weights_is_never_opened(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "o/n"}))
    (model / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(model, "whole model and an adapter")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", b"", "empty"),
        ("model.safetensors", b"abc", "cut short"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}", "safetensors"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", "safetensors"),
        ("config.json", b'{"model_type": "llama", ', r"config\.json: not JSON"),
        ("config.json", b"\xff\xfe\x00", r"config\.json: not JSON"),
        ("config.json", b"[]", "JSON object"),
        ("config.json", b"{}", "cannot be loaded"),
        ("config.json", b'{"model_type": "brandnew9"}', "brandnew9"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer.json", b"", r"tokenizer\.json: not JSON"),
        ("tokenizer_config.json", b"3", "JSON object"),
        ("generation_config.json", b"nonsense", r"generation_config\.json: not JSON"),
        ("chat_template.jinja", b"{% if %}", "chat template"),
        ("chat_template.jinja", b"\xff\xff", "tokenizer cannot be loaded"),
        ("chat_template.jinja", b"no messages at all", "leaves out a message"),
    ],
)
def test_a_damaged_file_is_named(model: Path, file: str, content: bytes, says: str) -> None:
    (model / file).write_bytes(content)
    refused(model, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded|shape"),
        ({"vocab_size": 100}, "shape|embeddings"),
        ({"num_hidden_layers": 3}, "lack"),
        ({"num_hidden_layers": 1}, "hold"),
        ({"intermediate_size": 65}, "shape"),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_refused(model: Path, change: dict[str, Any], says: str) -> None:
    told = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(told))
    refused(model, says)


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    rewrite(model, lambda w: w | {"model.embed_tokens.weight": w["model.embed_tokens.weight"][:300].clone()})
    told = json.loads((model / "config.json").read_text()) | {"vocab_size": 300}
    (model / "config.json").write_text(json.dumps(told))
    refused(model, "do not belong together")


def test_a_directory_is_looked_at_again_when_its_files_change(model: Path) -> None:
    check_directory(model)
    (model / "config.json").write_text("{")
    with pytest.raises(InputError):
        check_directory(model)


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """An adapter's directory, and the model it is on with the adapter active."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SOLON_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = get_peft_model(whole, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted.eval()


def test_an_adapter_s_directory_is_a_model(adapter: tuple[Path, Any]) -> None:
    where, adapted = adapter
    model, tokenizer = load_causal_lm(str(where), dtype="float32")
    ids = torch.tensor([tokenizer("What is tea?")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, adapted(ids).logits, atol=1e-4)
    assert resolve(str(where)) == resolve(str(where)) != str(where)
    again = load_tokenizer(resolve(str(where)))
    assert again.chat_template == tokenizer.chat_template


def test_an_adapter_that_cannot_be_put_on_is_one_line(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    where, _ = adapter
    told = json.loads((where / "adapter_config.json").read_text())

    def changed(**change: Any) -> None:
        (where / "adapter_config.json").write_text(json.dumps(told | change))

    for change, says in (
        ({"base_model_name_or_path": "nobody/nothing"}, "not on this machine"),
        ({"base_model_name_or_path": None}, "which model"),
        ({"base_model_name_or_path": 3}, "which model"),
        ({"peft_type": "PREFIX_TUNING"}, "only LoRA"),
        ({"r": 3}, "does not fit"),
        ({"target_modules": ["nothing"]}, "does not fit"),
    ):
        changed(**change)
        refused(where, says)
    changed()
    kept = load_file(where / "adapter_model.safetensors")
    save_file({k: v * math.nan for k, v in kept.items()}, where / "adapter_model.safetensors")
    refused(where, "finite")
    save_file(dict(list(kept.items())[1:]), where / "adapter_model.safetensors")
    refused(where, "does not fit")
    (where / "adapter_model.safetensors").rename(where / "adapter_model.bin")
    refused(where, "adapter_model.safetensors")


# --- any damage -----------------------------------------------------------------------------------------------


def damage(where: Path, rng: random.Random) -> str:
    """Damages one file of a model directory; says how."""
    path = rng.choice(sorted(p for p in where.iterdir() if p.is_file()))
    data = path.read_bytes()
    how = rng.choice(["cut", "flip", "empty", "noise", "remove", "value", "key", "header"])
    if how == "remove":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "noise":
        path.write_bytes(rng.randbytes(rng.randrange(1, 4000)))
    elif how == "header":
        path.write_bytes(data[:8] + data[9 : 9 + rng.randrange(40)] + data[60:])
    elif path.suffix == ".json" and how in ("value", "key"):
        _damage_json(path, data, how, rng)
    else:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 20)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
    return f"{how} {path.name}"


def _damage_json(path: Path, data: bytes, how: str, rng: random.Random) -> None:
    told = json.loads(data)
    part = told
    while isinstance(part, dict) and part:
        key = rng.choice(sorted(part))
        if isinstance(part[key], dict) and part[key] and rng.random() < 0.7:
            part = part[key]
            continue
        if how == "key":
            del part[key]
        else:
            part[key] = rng.choice([None, -1, 0, 1e300, "x", [], {}, True, 10**9, [[]], "\ud800", 0.5, {"a": 1}])
        break
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_directory_loads_as_it_was_or_is_one_line(tiny: str, tmp_path: Path, part: int) -> None:
    """More of them: SOLON_DAMAGED=200."""
    from solon.engines.base import GenerationRequest, Sampling
    from solon.engines.local import LocalEngine

    for n in range(int(os.environ.get("SOLON_DAMAGED", 40)) // 4):
        where = Path(shutil.copytree(tiny, tmp_path / f"{n}"))
        how = damage(where, random.Random(f"{part}/{n}"))
        try:
            engine = LocalEngine.load(str(where), dtype="float32")
            [made] = engine.generate([GenerationRequest("a", (user("hi"),))], Sampling(2))
        except InputError as error:
            assert "\n" not in str(error) and str(where) in str(error), how
        except Exception as error:  # which damage it was is what one wants to know
            raise AssertionError(f"{how} (part {part}, {n})") from error
        else:
            assert made.error is None or "tokens" in made.error, how
        shutil.rmtree(where)
