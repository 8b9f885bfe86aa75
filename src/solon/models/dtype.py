"""`dtype: auto`: float32 or bfloat16, the faster of the two for the work that will run on this machine.

Generation and training are timed apart because they need different things of a machine. Generation reads all weights for a
few tokens; training multiplies large matrices, forward and backward. Solon times its own sampler and a training step with
adapters, on the first blocks of the model's configuration with random weights. This small model proves its passes first, as
any model does (models/proof.py). A GPU that supports bfloat16 gets bfloat16 without a measurement.
"""

from __future__ import annotations

import copy
import functools
import sys
import timeit
from collections.abc import Callable
from typing import Any, Literal

import torch

from solon import distributed
from solon.errors import InputError

Work = Literal["generation", "training"]
WORTH = 1.1  # bfloat16 must be faster by this factor, because it rounds more than float32
BLOCKS = 3  # blocks of the small model
ROUNDS = 3  # the fastest one counts
NAMES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decide(where: str, work: Work) -> str:
    """The name of the faster dtype for this work. The decision is printed on stderr.

    where: directory or hub id of the model. Of several processes, the first one measures.
    """
    return distributed.broadcast(_decide(where, work))


@functools.cache
def _decide(where: str, work: Work) -> str:
    name, reason = _measure(where, work)
    if distributed.is_main():
        print(f"dtype for {work}: {name} ({reason})", file=sys.stderr)
    return name


def _measure(where: str, work: Work) -> tuple[str, str]:
    """The name of the dtype, and the reason in words."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "the GPU supports it"
        return "float32", "the GPU does not support bfloat16"
    if not products_are_fast():
        return "float32", "this processor multiplies in bfloat16 more slowly"
    try:
        seconds = {name: time_work(where, work, dtype) for name, dtype in NAMES.items()}
    except (InputError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        return "float32", f"no small model could be built for timing: {type(error).__name__}"
    ratio = seconds["float32"] / seconds["bfloat16"]
    return "bfloat16" if ratio >= WORTH else "float32", f"bfloat16 is {ratio:.2f} times as fast as float32 here"


def products_are_fast() -> bool:
    """Whether a matrix product in bfloat16 is about as fast as one in float32, or faster.

    Processors without instructions for bfloat16 emulate it, many times slower; then nothing else needs to be timed.
    """
    seconds = {}
    for name, dtype in NAMES.items():
        matrix = torch.ones(512, 512, dtype=dtype)
        seconds[name] = fastest_seconds(functools.partial(torch.mm, matrix, matrix), rounds=5)
    return seconds["bfloat16"] < 1.25 * seconds["float32"]


def fastest_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest round, after a first round that does not count."""
    work()
    return min(timeit.repeat(work, number=1, repeat=rounds))


def time_work(where: str, work: Work, dtype: torch.dtype) -> float:
    """Seconds for a small amount of this work, with the first blocks of the model in this dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from solon.models.decoding import decode
    from solon.models.head import head_of, logprobs_and_entropy
    from solon.models.lora import add_adapters
    from solon.models.passes import lay_out
    from solon.models.settings import AdapterSettings

    config = copy.deepcopy(AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=True))
    text = config.get_text_config()
    blocks, text.num_hidden_layers = text.num_hidden_layers, min(BLOCKS, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    rows = torch.randint(0, text.vocab_size, (16, 48), generator=torch.Generator().manual_seed(0)).tolist()
    if work == "generation":
        uniforms = torch.rand((len(rows), 12), generator=torch.Generator().manual_seed(0))
        return fastest_seconds(lambda: decode(model, rows, uniforms, max_tokens=12, temperature=1.0, end=set()))
    rows, policy = rows[:8], add_adapters(model, AdapterSettings())
    # Half of a row is an answer. Of it, the head reads so few tokens that its share of the time is that of the whole model.
    learned = max(1, len(rows[0]) // 2 * text.num_hidden_layers // blocks)
    tokens = torch.tensor([token for row in rows for token in row[-learned:]], device=policy.device)

    def step() -> None:
        layout = lay_out(policy, rows, 0)
        hidden = layout.gather(
            layout.hidden_states(policy), [range(len(row) - 1 - learned, len(row) - 1) for row in rows]
        )
        logprobs_and_entropy(hidden, head_of(policy), tokens, 1.0, entropy=False)[0].mean().backward()

    return fastest_seconds(step)
