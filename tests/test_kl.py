"""The KL of the policy that is written: that of the two models, whatever training said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from solon.analysis.kl import kl_of_written
from solon.errors import InputError
from solon.measures.statistics import mean
from solon.models.chat.encode import chat_ids
from solon.models.weights import load_causal_lm
from solon.records import Prompt, user

PROMPTS = [Prompt(id=str(i), prompt=(user(f"Question number {i}, and {'more ' * i}?"),)) for i in range(12)]
HOW: dict[str, Any] = {"system": "You help.", "temperature": 0.8, "max_tokens": 10, "dtype": "float32"}


def moved(model: str, out: Path, by: float) -> str:
    """The model with another output head, written down."""
    lm, tokenizer = load_causal_lm(model, dtype="float32")
    noise = torch.randn(lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach() + by * noise)
    lm.config.tie_word_embeddings = False
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


@torch.no_grad()
def by_hand(policy: str, reference: str, prompts: list[Prompt], temperature: float, tokens: int) -> float:
    """E over the policy's responses of log p - log r by enumerating the first token, and sampling nothing after it."""
    assert tokens == 1
    found = []
    models = [load_causal_lm(m, dtype="float32") for m in (policy, reference)]
    for p in prompts:
        ids = torch.tensor([chat_ids(models[0][1], p.prompt, system="You help.")])
        logs = [(m(input_ids=ids).logits[0, -1].float() / temperature).log_softmax(-1) for m, _ in models]
        found.append(float((logs[0].exp() * (logs[0] - logs[1])).sum()))
    return sum(found) / len(found)


def test_it_is_the_kl_of_the_two_models(tiny: str, tmp_path: Path) -> None:
    other = moved(tiny, tmp_path / "moved", 0.6)
    many = [p.model_copy(update={"id": f"{p.id}-{n}"}) for p in PROMPTS[:4] for n in range(150)]
    found = kl_of_written(other, tiny, many, **{**HOW, "max_tokens": 1})
    exact = by_hand(other, tiny, PROMPTS[:4], 0.8, 1)
    assert exact > 0.2
    low, high = found["kl_nats"]["low"], found["kl_nats"]["high"]
    assert low < exact < high and high - low < exact  # one draw of it; the seed is fixed


def test_a_policy_that_did_not_move_has_none_and_one_that_did_has_more_the_longer_it_speaks(
    tiny: str, tmp_path: Path
) -> None:
    same = kl_of_written(tiny, tiny, PROMPTS, **HOW)
    assert same["identical"] and set(same["by_prompt"].values()) == {0.0} and same["not_finite"] == 0
    other = moved(tiny, tmp_path / "moved", 1.5)
    short, long = (kl_of_written(other, tiny, PROMPTS, **{**HOW, "max_tokens": n}) for n in (2, 24))
    assert not short["identical"] and 0 < short["kl_nats"]["value"] < long["kl_nats"]["value"]
    assert long["kl_nats"] == mean(list(long["by_prompt"].values())).to_json() and long["kl_nats"]["n"] == 12


def test_a_prompts_response_does_not_depend_on_its_neighbours(tiny: str, tmp_path: Path) -> None:
    other = moved(tiny, tmp_path / "moved", 0.5)
    whole, part = (kl_of_written(other, tiny, p, **HOW)["by_prompt"] for p in (PROMPTS, PROMPTS[5:7]))
    assert all(abs(part[i] - whole[i]) < 1e-4 for i in part)


def test_bfloat16_measures_the_same_to_its_precision(tiny: str, tmp_path: Path) -> None:
    other = moved(tiny, tmp_path / "moved", 1.5)
    wide, narrow = (kl_of_written(other, tiny, PROMPTS * 1, **{**HOW, "dtype": d}) for d in ("float32", "bfloat16"))
    assert narrow["kl_nats"]["low"] < wide["kl_nats"]["high"] and wide["kl_nats"]["low"] < narrow["kl_nats"]["high"]
    assert kl_of_written(tiny, tiny, PROMPTS, **{**HOW, "dtype": "bfloat16"})["identical"]


def test_prompts_that_leave_no_room_are_counted(tiny: str) -> None:
    long = Prompt(id="long", prompt=(user("word " * 20_000),))
    found = kl_of_written(tiny, tiny, [*PROMPTS, long], **HOW)
    assert found["left_out"] == {"too long": 1} and found["examples"] == 12
    with pytest.raises(InputError, match=r"none of the 1 held-out prompts can be answered in 10 tokens \(1 too long\)"):
        kl_of_written(tiny, tiny, [long], **HOW)
    json.dumps(found)
