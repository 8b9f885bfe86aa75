"""How many tokens a model reads. Longer texts are refused whole.

Sampling, scoring and training share this check. A text cut at its beginning would lose the system message, and a text cut at
its end would lose the answer. A text that is far too long is refused before it is tokenised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from solon.errors import Unfit

# Names of the number in configurations. The model type decides; transformers maps most of them to the first name.
NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_target_positions"
)  # fmt: skip
LARGEST = 100_000_000  # tokenizers write 10^30 for "unknown"
ALREADY_SCALED = ("llama3", "default", "mrope")  # the configuration's number includes the scaling
# Rotary positions of these kinds change for all tokens of a pass when one text in it is longer than the model's first training
# length. A row's numbers would then depend on the other rows, so texts stay within that length.
SCALED_BY_PASS = ("dynamic", "longrope", "su")


@dataclass(frozen=True)
class Limit:
    """The largest number of tokens of a text, and the reason for it. None: no limit is known."""

    tokens: int | None
    reason: str = "the model's context"

    def less(self, tokens: int, use: str) -> Limit:
        """The limit where this many tokens are needed for `use`."""
        if self.tokens is None:
            return self
        return Limit(self.tokens - tokens, f"{self.reason} of {self.tokens}, less {tokens} for {use}")

    def at_most(self, tokens: int, reason: str) -> Limit:
        """The lower of the two limits."""
        return Limit(tokens, reason) if self.tokens is None or tokens < self.tokens else self

    def check(self, tokens: int) -> None:
        """Raises Unfit where a text has more tokens than the limit."""
        if self.tokens is not None and tokens > self.tokens:
            raise Unfit(f"the text has {tokens} tokens; {max(self.tokens, 0)} fit ({self.reason})", "too long")

    def check_text(self, tokenizer: Any, text: str) -> None:
        """Raises Unfit where the text would be too long even if all of its tokens were the longest. Reads no text."""
        longest = longest_token(tokenizer)
        if self.tokens is not None and len(text) > max(self.tokens, 0) * longest:
            raise Unfit(
                f"the text has {len(text)} characters, at least {len(text) // longest} tokens; "
                f"{max(self.tokens, 0)} fit ({self.reason})",
                "too long",
            )


UNLIMITED = Limit(None)


def context_limit(config: Any, tokenizer: Any = None) -> Limit:
    """The longest text that a model reads, from its configuration and its tokenizer. Sliding windows do not limit it."""
    text = config.get_text_config()
    numbers = (_token_count(getattr(part, name, None)) for part in (text, config) for name in NAMES)
    positions = next(filter(None, numbers), None)
    known = [_with_rope_scaling(text, positions) if positions else None]
    known.append(_token_count(getattr(tokenizer, "model_max_length", None)))
    return Limit(min(filter(None, known), default=None))


def _token_count(n: Any) -> int | None:
    """The number, where it can be a number of tokens."""
    return n if isinstance(n, int) and not isinstance(n, bool) and 0 < n < LARGEST else None


def _with_rope_scaling(config: Any, positions: int) -> int:
    """The positions after scaling. Some kinds of rotary positions stretch the length of the first training by a factor."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return positions
    kinds = [rope] if "rope_type" in rope or "type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        name, factor = kind.get("rope_type") or kind.get("type") or "default", kind.get("factor")
        trained = _token_count(kind.get("original_max_position_embeddings"))
        if name in SCALED_BY_PASS:
            trained = trained or _token_count(getattr(config, "original_max_position_embeddings", None))
            positions = min(positions, trained or positions)
        elif name not in ALREADY_SCALED and isinstance(factor, int | float) and factor > 1:
            if trained:
                positions = max(positions, int(trained * factor))
            elif name == "linear":
                positions = int(positions * factor)
    return positions


@functools.lru_cache(maxsize=16)
def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)
