"""What a model proves when it is loaded, and what happens where it does not."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import build
from solon.errors import InputError
from solon.models import proof
from solon.models.forward import attention_of, forward, in_higher_precision, use_attention
from solon.models.head import head_of
from solon.models.passes import fast
from solon.models.paths import FAST, paths_of
from tests.fast_passes import needs_fast
from tests.small_llamas import CONFIGS, build_model


@needs_fast
def test_a_llama_takes_the_fast_path_in_float32_and_in_bfloat16() -> None:
    for dtype, least in ((torch.float32, 1e-4), (torch.bfloat16, 1e-3)):
        paths = paths_of(build_model(CONFIGS["llama"]).to(dtype))
        assert paths.prefix_tree and paths.llama_forward and paths.padded and not paths.notes
        assert paths.error <= paths.bound and paths.bound >= least


@needs_fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_attention_is_noticed_and_transformers_own_is_taken(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from solon.models.fast import attention, reader

    whole = attention.last_token
    for module in (attention, reader):
        monkeypatch.setattr(module, "last_token", lambda q, k, v, hidden, scaling: whole(q, k, v, None, scaling))
    model = build_model(CONFIGS["llama"]).to(dtype)
    paths = paths_of(model)
    assert not paths.prefix_tree and not paths.llama_forward and paths.attention == attention_of(model) == "sdpa"
    assert len(paths.notes) == 2 and all("off by" in note for note in paths.notes)
    assert "transformers' own" in paths.sentence() and "off by" in paths.sentence()


def test_scores_that_the_trainers_would_get_wrong_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from solon.models.head import Head

    model = build("granite")
    monkeypatch.setattr(Head, "__call__", lambda self, hidden: self.layer(hidden).float())
    with pytest.raises(InputError, match=r"GraniteForCausalLM \(granite\) cannot be used: .*off by"):
        paths_of(model)


def test_no_fast_path_is_tried_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAST, "0")
    paths = paths_of(build_model(CONFIGS["llama"]))
    assert (paths.prefix_tree, paths.llama_forward, paths.attention, paths.notes) == (False, False, "sdpa", ())


def test_a_model_that_nothing_reproduces_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(CONFIGS["llama"])
    whole = model.model.forward

    def moody(*args: Any, **given: Any) -> Any:
        """Another answer where there is a cache or padding."""
        out = whole(*args, **given)
        if given.get("attention_mask") is not None or given.get("past_key_values") is not None:
            out.last_hidden_state = out.last_hidden_state * 1.5
        return out

    monkeypatch.setattr(model.model, "forward", moody)
    monkeypatch.setenv(FAST, "0")
    with pytest.raises(InputError, match=r"LlamaForCausalLM \(llama\) cannot be used: .*off by .* nats"):
        paths_of(model)


@needs_fast
@pytest.mark.parametrize(
    "arguments", [{"softcap": 20.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"is_causal": False}, {"news": 1}]
)
def test_an_argument_of_attention_that_is_not_understood_is_not_taken_over(arguments: dict[str, Any]) -> None:
    from solon.models.fast.attention import NotUnderstood, grouped_attention

    q = k = v = torch.zeros(1, 4, 3, 8)
    with pytest.raises(NotUnderstood, match=next(iter(arguments))):
        grouped_attention(None, q, k, v, None, scaling=1.0, **arguments)
    grouped_attention(None, q, k, v, None, scaling=1.0, softcap=None, dropout=0.0, sliding_window=7)


@pytest.mark.parametrize(
    ("family", "factor"), [("llama", 1.0), ("granite", 0.25), ("cohere", 0.3), ("gemma2", None), ("phi", None)]
)
def test_scores_are_the_model_s_own(family: str, factor: float | None) -> None:
    model = build(family)
    ids = torch.arange(5, 17).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        hidden = forward(model.base_model, input_ids=ids).last_hidden_state[0]
        assert torch.allclose(head_of(model)(hidden), expected, atol=1e-5)
    assert head_of(model).factor == (None if factor is None else pytest.approx(factor, rel=1e-5))


def test_scores_of_a_bfloat16_model_are_not_rounded_to_its_steps() -> None:
    model = build_model(CONFIGS["llama"]).to(torch.bfloat16).requires_grad_(False)
    hidden = (torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) * 20).to(torch.bfloat16)
    exact = hidden.double() @ model.lm_head.weight.double().T
    assert torch.allclose(head_of(model)(hidden).double(), exact, rtol=1e-5, atol=1e-4)
    assert (model.lm_head(hidden).double() - exact).abs().max() > 1e-2
    hidden.requires_grad_()
    head_of(model)(hidden)[:, 3].sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, model.lm_head.weight[3].expand(6, -1))


def test_higher_precision_is_exact_and_leaves_no_trace() -> None:
    model = build_model(CONFIGS["llama"]).to(torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    twin = copy.deepcopy(model).float()
    ids = torch.arange(5, 17).unsqueeze(0)
    with torch.no_grad(), in_higher_precision(model, torch.float32):
        logits = model(input_ids=ids).logits
    assert torch.allclose(logits, twin(input_ids=ids).logits, atol=1e-4)
    assert all(torch.equal(p, before[n]) and p.dtype == torch.bfloat16 for n, p in model.named_parameters())
    assert not any("_narrow" in vars(m) for m in model.modules())


@needs_fast
def test_a_tree_that_would_hide_a_window_is_not_laid_out() -> None:
    from solon.models.fast.attention import GROUPED, NotUnderstood
    from solon.models.fast.packed_prefix_tree import active_tree, pack_rows

    model = build("mistral")  # a window of 32
    use_attention(model, GROUPED)
    rows = [list(range(3, 33)), list(range(3, 40))]
    tree, _ = pack_rows(rows)
    ids, positions = torch.tensor([tree.ids]), torch.tensor([tree.positions])
    with pytest.raises(NotUnderstood, match="mask"), active_tree(tree, 0, torch.empty(0)):
        model(input_ids=ids, position_ids=positions)
    assert paths_of(model).fits(32) and not paths_of(model).fits(33)


def test_env_says_what_was_proved_of_a_model(tiny: str) -> None:
    from typer.testing import CliRunner

    from solon.cli import app

    result = CliRunner().invoke(app, ["env", "--model", tiny, "--dtype", "float32"])
    assert result.exit_code == 0
    path = "Solon's fast path with its own" if fast() else "transformers' own"
    assert f"way: {path} forward pass" in result.stdout
    assert "scores: output layer times 1" in result.stdout
    elsewhere = CliRunner().invoke(app, ["env", "--model", "server:m@http://127.0.0.1:9/v1"])
    assert elsewhere.exit_code == 2


def test_a_way_that_is_not_fast_is_said_once_and_kept_for_the_stage(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from solon.models import paths
    from solon.models.weights import load_causal_lm

    monkeypatch.setenv(FAST, "0")
    monkeypatch.setattr(paths, "_PRINTED", set())
    paths.take_recorded_paths()
    for _ in range(2):
        load_causal_lm(tiny, "float32")
    assert capsys.readouterr().err.count("transformers' own forward pass (sdpa attention)") == 1
    assert list(paths.take_recorded_paths()) == [tiny] and not paths.take_recorded_paths()


def test_models_from_the_same_files_prove_themselves_once(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: equal files, class and dtype: one proof, and the same path. A changed file or another dtype: a new proof."""
    from solon.models import paths
    from solon.models.weights import load_causal_lm

    monkeypatch.setattr(paths, "_PROVED", {})
    proofs: list[str] = []
    prove = proof.prove
    monkeypatch.setattr(proof, "prove", lambda model: (proofs.append(type(model).__name__), prove(model))[1])
    where = Path(shutil.copytree(tiny, tmp_path / "model"))
    first, second = (load_causal_lm(str(where), "float32")[0] for _ in range(2))
    assert len(proofs) == 1 and paths_of(first) == paths_of(second) and attention_of(first) == attention_of(second)
    load_causal_lm(str(where), "bfloat16")
    assert len(proofs) == 2
    os.utime(where / "model.safetensors", ns=(1, 1))
    load_causal_lm(str(where), "float32")
    assert len(proofs) == 3
