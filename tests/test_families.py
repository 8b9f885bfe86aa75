"""Model families that users bring go the right way, each built small: `python -m benchmarks.families` runs them all."""

from __future__ import annotations

import pytest

from benchmarks.families import check
from solon.models.passes import fast

# Of each kind at least one: windows, caps on scores, scaled heads, biases, tied heads, norms of queries and keys, sinks,
# mixtures of experts, positions that are learned or biases, old layers without a replaceable attention.
FAST = ["llama", "mistral", "qwen3", "olmo2", "phi", "gemma3_text", "granite", "cohere", "mixtral", "gpt2", "opt"]
PLAIN = ["gpt_oss", "gemma2", "bloom"]


@pytest.mark.parametrize("family", [*FAST, *PLAIN])
def test_sampler_scorer_and_trainer_give_transformers_own_numbers(family: str) -> None:
    found = check(family)
    assert not found.wrong, found
    assert found.path == ("fast" if family in FAST and fast() else "plain"), (
        found
    )  # plain too where models/fast is gone
    assert found.layers == "as asked"
