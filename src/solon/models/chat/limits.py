"""How many tokens a model reads, and which texts are beyond that.

Checked in one place for sampling, scoring and training. A text beyond the limit is refused whole: cut at its beginning it
would lose the system message, cut at its end its answer. A text that is hopelessly long is refused before it is tokenised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from solon.errors import Unfit

# What configurations call it; the model type decides (transformers maps most of them to the first).
NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_target_positions",
)
LARGEST = 100_000_000  # tokenizers write 10^30 for "not known"
SCALED_ALREADY = ("llama3", "default", "mrope")  # the configuration's number holds the scaling
# Rotary positions of these kinds change for all tokens of a pass, once one text in it is longer than the model was first
# trained on: a row's numbers would depend on its neighbours. So texts stay within that length.
OF_THE_WHOLE_PASS = ("dynamic", "longrope", "su")


@dataclass(frozen=True)
class Limit:
    """At most so many tokens of text, because of `why`. None: no limit is known."""

    tokens: int | None
    why: str = "the model's context"

    def less(self, tokens: int, what: str) -> Limit:
        """The limit where so many tokens are still to come."""
        if self.tokens is None:
            return self
        return Limit(self.tokens - tokens, f"{self.why} of {self.tokens}, less {tokens} for {what}")

    def at_most(self, tokens: int, why: str) -> Limit:
        """The lower of the two limits."""
        return Limit(tokens, why) if self.tokens is None or tokens < self.tokens else self

    def check(self, tokens: int) -> None:
        """Raises Unfit where a text has more tokens."""
        if self.tokens is not None and tokens > self.tokens:
            raise Unfit(f"the text has {tokens} tokens; {max(self.tokens, 0)} fit ({self.why})", "too long")

    def check_text(self, tokenizer: Any, text: str) -> None:
        """Raises Unfit where even the longest tokens would not make a text short enough. Looks at its length alone."""
        longest = longest_token(tokenizer)
        if self.tokens is not None and len(text) > max(self.tokens, 0) * longest:
            raise Unfit(
                f"the text has {len(text)} characters, at least {len(text) // longest} tokens; "
                f"{max(self.tokens, 0)} fit ({self.why})",
                "too long",
            )


UNLIMITED = Limit(None)


def context_limit(config: Any, tokenizer: Any = None) -> Limit:
    """The longest text that a model reads, of its configuration and its tokenizer's. Sliding windows do not limit it."""
    parts = (config.get_text_config(), config)
    said = next((n for part in parts for name in NAMES if (n := _sane(getattr(part, name, None)))), None)
    known = [_with_rope_scaling(parts[0], said)] if said else []
    if own := _sane(getattr(tokenizer, "model_max_length", None)):
        known.append(own)
    return Limit(min(known)) if known else UNLIMITED


def _sane(n: Any) -> int | None:
    """The number where it may be a number of tokens."""
    return n if isinstance(n, int) and not isinstance(n, bool) and 0 < n < LARGEST else None


def _with_rope_scaling(config: Any, positions: int) -> int:
    """Positions after scaling: kinds that stretch the positions a model was trained on by a factor."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return positions
    kinds = [rope] if "rope_type" in rope or "type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        name, factor = kind.get("rope_type") or kind.get("type") or "default", kind.get("factor")
        if name in OF_THE_WHOLE_PASS:
            trained = _sane(kind.get("original_max_position_embeddings")) or _sane(
                getattr(config, "original_max_position_embeddings", None)
            )
            positions = min(positions, trained or positions)
            continue
        if name in SCALED_ALREADY or not isinstance(factor, int | float) or not factor > 1:
            continue
        if trained := _sane(kind.get("original_max_position_embeddings")):
            positions = max(positions, int(trained * factor))
        elif name in ("linear", "dynamic"):
            positions = int(positions * factor)
    return positions


@functools.lru_cache(maxsize=16)
def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)
