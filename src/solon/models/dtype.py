"""`dtype: auto`: float32 or bfloat16, whichever is faster on this machine for what will be run.

Generation and training are timed apart, since they need different things of a machine: one reads all the weights for a few
tokens, the other multiplies large matrices, forward and backward. What is timed is Solon's own sampler and a training step
with adapters, on the first blocks of the model's own configuration with random weights; in which way they go through the
model (fast or transformers' own) is proved first, as for any model. A GPU that knows bfloat16 gets bfloat16 untimed.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from solon import distributed
from solon.errors import InputError

Work = Literal["generation", "training"]
WORTH = 1.1  # bfloat16 must be this many times as fast: it rounds, and float32 does not
BLOCKS = 3  # of the model, timed
ROUNDS = 3  # the fastest counts
NAMES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decide(where: str, work: Work) -> str:
    """The faster dtype for this work with the model in this directory (or of this hub id), and says so on stderr.

    Of several processes the first one measures.
    """
    return distributed.broadcast(_decide(where, work))


@functools.cache
def _decide(where: str, work: Work) -> str:
    chosen, why = _chosen(where, work)
    if distributed.is_main():
        print(f"dtype for {work}: {chosen} ({why})", file=sys.stderr)
    return chosen


def _chosen(where: str, work: Work) -> tuple[str, str]:
    """The dtype, and the reason in words."""
    if torch.cuda.is_available():
        return (
            ("bfloat16", "the GPU knows it")
            if torch.cuda.is_bf16_supported()
            else ("float32", "the GPU knows no other")
        )
    if not products_are_fast():
        return "float32", "this processor multiplies in bfloat16 more slowly"
    try:
        seconds = {name: timed(where, work, dtype) for name, dtype in NAMES.items()}
    except (InputError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        return "float32", f"no small model could be made to be timed: {type(error).__name__}"
    ratio = seconds["float32"] / seconds["bfloat16"]
    return "bfloat16" if ratio >= WORTH else "float32", f"bfloat16 is {ratio:.2f} times as fast as float32 here"


def products_are_fast() -> bool:
    """Whether a matrix product in bfloat16 is about as fast as one in float32, or faster.

    Processors without instructions for bfloat16 emulate them many times slower, and nothing else needs to be timed.
    """
    seconds = {}
    for name, dtype in NAMES.items():
        a = torch.ones(512, 512, dtype=dtype)
        seconds[name] = fastest(lambda a=a: a @ a, rounds=5)  # type: ignore[misc]
    return seconds["bfloat16"] < 1.25 * seconds["float32"]


def fastest(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of some rounds, after one that does not count."""
    work()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def timed(where: str, work: Work, dtype: torch.dtype) -> float:
    """Seconds that a small piece of this work takes with the first blocks of the model, in this dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = copy.deepcopy(AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=True))
    text = config.get_text_config()
    text.num_hidden_layers = min(BLOCKS, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    rows = torch.randint(0, text.vocab_size, (16, 48), generator=torch.Generator().manual_seed(0)).tolist()
    return fastest(_generation(model, rows) if work == "generation" else _training(model, rows[:8]))


def _generation(model: Any, rows: list[list[int]]) -> Callable[[], Any]:
    from solon.models.decoding import decode

    uniforms = torch.rand((len(rows), 12), generator=torch.Generator().manual_seed(0))
    return lambda: decode(model, rows, uniforms, max_tokens=12, temperature=1.0, end=set())


def _training(model: Any, rows: list[list[int]]) -> Callable[[], Any]:
    from solon.models.head import head_of, logprobs_and_entropy
    from solon.models.lora import add_adapters
    from solon.models.passes import lay_out
    from solon.models.settings import AdapterSettings

    policy = add_adapters(model, AdapterSettings())
    tokens = torch.tensor([t for row in rows for t in row[1:]], device=policy.device)

    def step() -> None:
        layout = lay_out(policy, rows, 0)
        hidden = layout.gather(layout.hidden_states(policy), [range(len(row) - 1) for row in rows])
        logprobs_and_entropy(hidden, head_of(policy), tokens, 1.0, entropy=False)[0].mean().backward()

    return step
