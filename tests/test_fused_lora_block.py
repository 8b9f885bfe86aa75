"""A block with adapters, written out, gives the block's numbers and gradients; where it would not, it stays out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config

pytest.importorskip("solon.models.fast")

from solon.models.fast.attention import GROUPED
from solon.models.fast.fused_lora_block import _FusedLoraLinears, fuse_adapters, fused_lora_block
from solon.models.lora import add_adapters
from solon.models.passes import lay_out
from solon.models.settings import AdapterSettings
from tests.small_llamas import CONFIGS, build_model

ROWS = [[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 30, 31]]


def adapted(config: Any, layers: int | None = None, *, dtype: torch.dtype = torch.float32) -> Any:
    model = build_model(config).to(dtype)
    model.set_attn_implementation(GROUPED)
    policy = add_adapters(model, AdapterSettings(rank=3, alpha=5, layers=layers))
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return policy.eval()


def plain(policy: Any) -> Any:
    """The same by transformers' and PEFT's own modules."""
    for module in policy.modules():
        vars(module).pop("forward", None)
    return policy


def written_out(policy: Any) -> int:
    return sum(getattr(vars(m).get("forward"), "__func__", None) is fused_lora_block for m in policy.modules())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many groups of layers went through `_FusedLoraLinears` in each call, as a list that grows."""
    calls: list[int] = []
    whole = _FusedLoraLinears.forward

    def counted(*given: Any) -> Any:
        calls.append(len(given[3]))
        return whole(*given)

    monkeypatch.setattr(_FusedLoraLinears, "forward", staticmethod(counted))
    return calls


def learned(policy: Any, padded: bool) -> list[torch.Tensor]:
    """States, with adapters and without, and gradients."""
    if padded:
        ids = torch.tensor([row + [0] * (5 - len(row)) for row in ROWS])
        mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in ROWS])

    def hidden_states() -> torch.Tensor:
        if not padded:
            return lay_out(policy, ROWS, 0).hidden_states(policy)
        out = policy.get_base_model().base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state[mask.bool()]

    policy.zero_grad()
    hidden = hidden_states()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).sum().backward()
    with policy.disable_adapter():
        bare = hidden_states()
    grads = [p.grad for p in policy.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.abs().max() > 0 for g in grads)
    return [hidden.detach(), bare.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_gradients_are_those_of_the_modules(
    name: str, layers: int | None, padded: bool, passes: list[int]
) -> None:
    policy = adapted(CONFIGS[name], layers)
    assert written_out(policy) == 3
    passes.clear()
    ours = learned(policy, padded)
    assert passes == [3, 1, 2, 1] * 3 * 2  # every block, with adapters and without
    theirs = learned(plain(policy), padded)
    assert not torch.allclose(ours[0], ours[1], atol=1e-2)  # the adapters do something
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("change", ["another family", "bfloat16", "other arithmetic"])
def test_another_model_keeps_its_own_blocks(change: str) -> None:
    if change == "another family":
        model = build_model(GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=64, vocab_size=64))
        assert written_out(add_adapters(model, AdapterSettings(rank=2))) == 0
    elif change == "bfloat16":
        assert written_out(adapted(CONFIGS["llama"], dtype=torch.bfloat16)) == 0
    else:
        policy = adapted(CONFIGS["llama"])
        policy.get_base_model().model.layers[2].mlp.register_forward_hook(lambda module, args, out: 2 * out)
        assert written_out(fuse_adapters(policy)) == 0


@pytest.mark.parametrize(
    "change", ["weights that learn", "a bias that learns", "two adapters", "one layer without", "checkpoints"]
)
def test_what_it_does_not_cover_goes_through_the_modules(change: str, passes: list[int]) -> None:
    policy = adapted(CONFIGS["llama, biases"])
    assert written_out(policy) == 3
    if change == "checkpoints":
        policy.get_base_model().gradient_checkpointing_enable()
        policy.train()
    elif change == "a bias that learns":
        policy.get_base_model().model.layers[1].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    elif change == "weights that learn":
        policy.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_(True)
    elif change == "two adapters":
        policy.add_adapter("more", policy.peft_config["default"])
        for name, p in policy.named_parameters():
            if "lora_B.more" in name:
                torch.nn.init.normal_(p, std=0.3)
        policy.base_model.set_adapter(["default", "more"])
        policy = fuse_adapters(policy)
    else:
        attention = policy.get_base_model().model.layers[1].self_attn
        attention.k_proj = attention.k_proj.base_layer
    passes.clear()
    padded = change == "checkpoints"  # what a tree looks like is forgotten when a block is computed again
    ours = learned(policy, padded)
    assert len(passes) < 3 * 4 * 2
    theirs = learned(plain(policy), padded)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
