"""Shared beginnings computed once: the same numbers as separate rows, and no token computed twice."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("solon.models.fast")

from solon.constitution import load_constitution
from solon.engines import ScoreRequest
from solon.engines.local import LocalEngine
from solon.feedback.labels import log_odds
from solon.feedback.settings import JudgeSettings
from solon.models.batching import Row
from solon.models.fast import packed_prefix_tree as tree
from solon.models.fast.attention import GROUPED
from solon.models.fast.packed_prefix_tree import build_tree
from solon.models.fast.scorer import TreeScorer, packs
from solon.models.forward import with_attention
from solon.records import Pair, user
from tests.asking import compare

# Few tokens and short rows: rows that begin alike, contain each other or are equal come up all the time.
ROWS = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=7), min_size=1, max_size=12)


def neighbours(rows: list[list[int]]) -> list[int]:
    return [0, *(tree.common_length(np.asarray(a), np.asarray(b)) for a, b in itertools.pairwise(rows))]


@given(ROWS)
def test_every_row_is_found_along_its_branches_and_no_token_stands_twice(drawn: list[list[int]]) -> None:
    rows = sorted({tuple(r) for r in drawn})
    lists = [list(r) for r in rows]
    grown = build_tree(lists, neighbours(lists), 0)
    for n, row in enumerate(lists):
        assert [grown.ids[i] for i in grown.indices(n)] == row
        assert [grown.positions[i] for i in grown.indices(n)] == list(range(len(row)))
    assert len(grown.ids) == len({r[:n] for r in rows for n in range(1, len(r) + 1)})
    assert sum(sum(f.lengths) for f in grown.families) == len(grown.ids)


@given(ROWS, st.integers(1, 20), st.integers(1, 9))
def test_packs_hold_every_row_once_and_keep_to_their_limits(drawn: list[list[int]], tokens: int, reads: int) -> None:
    rows = [Row(r, len(r) - 1) for r in sorted(drawn)]
    shared = neighbours([r.ids for r in rows])
    parts = list(packs(rows, range(len(rows)), shared, 0, tokens, reads))
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(len(rows)))
    for p in parts:
        held = {tuple(r.ids[:n]) for r in rows[p] for n in range(1, len(r.ids) + 1)}
        assert p.stop - p.start == 1 or (len(held) <= tokens and p.stop - p.start <= reads)


def separately(model: Any, row: Row) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.ids])).logits[0, row.first :]


@settings(deadline=None, max_examples=60)
@given(ROWS, st.data())
def test_logits_are_those_of_separate_rows(models: list[Any], drawn: list[list[int]], data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(models))
    rows = [Row(ids, data.draw(st.integers(0, len(ids) - 1))) for ids in drawn]
    scorer = TreeScorer(model, tokens=data.draw(st.sampled_from([4, 9, 4096])), reads=data.draw(st.integers(1, 50)))
    seen = []
    for picked, logits in scorer(rows):
        expected = torch.cat([separately(model, rows[i]) for i in picked])
        assert torch.allclose(logits, expected, atol=1e-4)
        seen += picked
    assert sorted(seen) == list(range(len(rows)))
    if scorer.tokens == 4096 and scorer.reads >= sum(len(r.ids) - r.first for r in rows):
        assert scorer.computed == len({tuple(r.ids[:n]) for r in rows for n in range(1, len(r.ids) + 1)})


@pytest.fixture(scope="module")
def models(tiny: str) -> list[Any]:
    """Grouped and plain heads, rotary and learned positions, biases: three families of random weights."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "initializer_range": 0.2, "attn_implementation": GROUPED}
    qwen = Qwen2Config(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, **shape
    )
    gpt2 = GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=64, **shape)
    return [
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation=GROUPED).eval(),
        *(AutoModelForCausalLM.from_config(c, attn_implementation=GROUPED).eval() for c in (qwen, gpt2)),
    ]


@pytest.mark.parametrize("stretch", [1, 2, 5, 11])
def test_branches_give_the_same_side_by_side_and_in_stretches(
    models: list[Any], monkeypatch: Any, stretch: int
) -> None:
    rows = [Row([3, 4, 5, *range(3, 3 + n)], 2) for n in (4, 5, 9)] + [
        Row([3, 4, 5, 6, 7, 8, 60 - n], 2) for n in range(9)
    ]
    rows += [Row([9] * 7, 0)]
    for model in models:
        whole = [logits for _, logits in TreeScorer(model)(rows)]
        with monkeypatch.context() as changed:
            changed.setattr(tree, "STRETCH", {"cpu": stretch})
            for a, b in zip(whole, (logits for _, logits in TreeScorer(model)(rows)), strict=True):
                assert torch.allclose(a, b, atol=1e-5)


PAIRS = [
    Pair(id=f"p{n}", prompt=(user(p),), responses=(a, b))
    for n, (p, a, b) in enumerate(
        [
            ("How do ships float?", "They push water aside.", "Magic, mostly. " * 8),
            ("Tell me a joke", "No.", "A horse walks into a bar."),
            ("x", "Same beginning and one end", "Same beginning and another end, much longer than that"),
        ]
    )
]


@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_labels_are_the_same_shared_or_not_and_in_batches_of_1_or_32(model: str, tiny: str) -> None:
    spec, pairs, principles = (tiny, PAIRS, None) if model == "tiny" else (model, PAIRS[:1], 2)
    rules = load_constitution("simple")
    labels = []
    for options in ({}, {"share": False}, {"score_tokens": 1}, {"share": False, "score_tokens": 1}):
        engine = LocalEngine.load(spec, dtype="float32", **options)
        comparisons = list(compare(pairs, engine, rules, JudgeSettings(principles_per_pair=principles)))
        assert (engine._tree is None) == ("share" in options)
        labels.append(
            [log_odds(c.label) for c in comparisons if c.label] + [j.forward for c in comparisons for j in c.judgements]
        )
    for other in labels[1:]:
        assert labels[0] == pytest.approx(other, abs=1e-3)


def test_tokens_that_requests_share_are_computed_once(tiny: str) -> None:
    engine = LocalEngine.load(tiny, dtype="float32")
    rules = load_constitution("solon")
    list(compare(PAIRS[:1], engine, rules, JudgeSettings(principles_per_pair=None)))
    assert engine._tree is not None
    k = len(rules.principles)
    assert engine.usage.requests == 2 * k
    assert engine._tree.computed < 0.35 * engine.usage.prompt_tokens


def test_answers_of_several_tokens_share_their_prompt(tiny: str) -> None:
    shared, plain = (LocalEngine.load(tiny, dtype="float32", share=s) for s in (True, False))
    request = ScoreRequest("r", (user("Say a number " * 5),), ("1", "10", "1 and a lot more"), "(", ")")
    [one], [other] = shared.score([request]), plain.score([request])
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_window_is_kept_whether_rows_are_longer_or_not(tiny: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

    config = MistralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=24, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    engine = LocalEngine(model, AutoTokenizer.from_pretrained(tiny), name="m", weights="w")
    assert engine.paths.prefix_tree and engine.paths.window == 24
    rows = [Row([*range(5, 5 + n), 7, 8 + n % 3], 0) for n in (3, 4, 9, 30, 31, 60)]
    logits_of = {r: logits for picked, logits in engine._logits(rows) for r, logits in zip(
        picked, logits.split([len(rows[r].ids) for r in picked]), strict=True)}  # fmt: skip
    assert 0 < engine._tree.computed < 24  # type: ignore[union-attr]
    for r, row in enumerate(rows):
        with with_attention(model, "eager"):
            assert torch.allclose(logits_of[r], separately(model, row), atol=1e-4)
