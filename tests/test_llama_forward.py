"""The written-out forward pass gives the logits of transformers' own, or is not used."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

pytest.importorskip("solon.models.fast")

from solon.models.fast import llama_forward as module
from solon.models.fast.llama_forward import find_llama_forward
from tests.small_llamas import CONFIGS, SHAPE, build_model


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, block: int) -> torch.Tensor:
    """Plain causal attention, as `LlamaForward` takes it."""
    gqa = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_model(name: str) -> None:
    model = build_model(CONFIGS[name])
    llama = find_llama_forward(model)
    assert llama is not None
    ids = torch.randint(0, 64, (1, 30), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids).logits[0, [3, 29]]
    assert torch.allclose(llama(ids[0].tolist(), range(30), causal, [3, 29]), expected, atol=1e-4)


@torch.no_grad()
def test_it_reads_the_weights_anew_each_time() -> None:
    model = build_model(CONFIGS["llama"])
    llama = find_llama_forward(model)
    assert llama is not None
    model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    ids = list(range(3, 20))
    expected = model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.allclose(llama(ids, range(17), causal, range(17)), expected, atol=1e-4)


@pytest.mark.parametrize("change", ["another family", "another activation", "adapters", "other arithmetic"])
def test_what_it_does_not_reproduce_it_leaves_alone(change: str) -> None:
    if change == "another family":
        model = build_model(GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=64, vocab_size=64))
    elif change == "another activation":
        model = build_model(LlamaConfig(**SHAPE, hidden_act="gelu"))
    else:
        model = build_model(CONFIGS["llama"])
    if change == "adapters":
        from solon.models.lora import add_adapters
        from solon.models.settings import AdapterSettings

        model = add_adapters(model, AdapterSettings(rank=2)).get_base_model()
    if change == "other arithmetic":  # a block that adds its input twice, as no Llama does
        block = model.model.layers[2]
        forward = block.forward
        block.forward = lambda states, *a, **k: forward(states, *a, **k) + states
    assert find_llama_forward(model) is None


def test_the_check_at_loading_would_see_a_wrong_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_norm", lambda norm, x: x * norm.weight)
    assert find_llama_forward(build_model(CONFIGS["llama"])) is None
