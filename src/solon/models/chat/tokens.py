"""A text as tokens, in which no text of people or models becomes a control token.

The tokenizer reads the whole text at once. Pieces tokenised apart would gain a space with tokenizers like SentencePiece, and
would lose merges with all others. Where a written part contains the name of a control token (`<|im_end|>`), Solon uses a copy
of the tokenizer in which every control token has a secret name. In the text, the control tokens that the template wrote get
their secret names. The ids stay the same, and the written parts are plain text.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

from solon.errors import InputError, Unfit, printable
from solon.models.chat.template import Span, template_of, tokenizer_name


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text. Each token stands for the characters from its start to its end, half-open."""

    ids: list[int]
    starts: list[int]
    ends: list[int]
    last_control: int  # index of the last control token; 0 where there is none

    def between(self, start: int, stop: int) -> Span:
        """The half-open span of the tokens that stand for these characters, whole or in part."""
        first = bisect_left(self._highest_ends, start + 1)
        if start == stop:
            return first, first
        return first, max(first, bisect_left(self._highest_starts, stop))

    @functools.cached_property
    def _highest_ends(self) -> list[int]:
        return list(accumulate(self.ends, max))

    @functools.cached_property
    def _highest_starts(self) -> list[int]:
        return list(accumulate(self.starts, max))


def encode(tokenizer: Any, text: str, written: Sequence[Span]) -> Tokens:
    """The tokens of the whole text, without added special tokens. written: the characters that must stay plain text.

    Raises Unfit where plain text cannot be kept from becoming a control token.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    control = control_tokens(tokenizer, template_of(tokenizer))
    tokens = _tokens(encoding["input_ids"], encoding["offset_mapping"], control)
    if not _has_forged_token(tokenizer, text, tokens, written):
        return tokens
    safe_tokenizer, secret_names = _renamed_tokenizer(tokenizer, template_of(tokenizer))
    name = re.compile("|".join(map(re.escape, sorted(control.values(), key=len, reverse=True))))
    safe, origin = [], [0]  # origin: for each boundary between characters of the safe text, its index in the text
    index = 0
    for start, stop in [*sorted(written), (len(text), len(text))]:
        for match in name.finditer(text, index, start):
            secret = secret_names[match[0]]
            safe += [text[index : match.start()], secret]
            origin += [*range(index + 1, match.start() + 1)] + [match.end()] * len(secret)
            index = match.end()
        safe.append(text[index:stop])
        origin += range(index + 1, stop + 1)
        index = stop
    safe_encoding = safe_tokenizer.encode("".join(safe), add_special_tokens=False)
    tokens = _tokens(safe_encoding.ids, [(origin[a], origin[b]) for a, b in safe_encoding.offsets], control)
    if _has_forged_token(tokenizer, text, tokens, written):
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: the text holds a control token of this model, which cannot be kept apart",
            "control token",
        )
    return tokens


def _tokens(ids: list[int], offsets: Sequence[Span], control: Collection[int]) -> Tokens:
    last = max((i for i, token in enumerate(ids) if token in control), default=0)
    return Tokens(ids, [start for start, _ in offsets], [stop for _, stop in offsets], last)


def _has_forged_token(tokenizer: Any, text: str, tokens: Tokens, written: Sequence[Span]) -> bool:
    """Whether a control token stands for characters that people or models wrote."""
    control = control_tokens(tokenizer, template_of(tokenizer))
    for token, start, stop in zip(tokens.ids, tokens.starts, tokens.ends, strict=True):
        if token not in control:
            continue
        part = text[start:stop]
        if token == tokenizer.unk_token_id and tokenizer.unk_token not in part:
            continue  # a character that the tokenizer does not know
        # A token that strips white space reaches into the text beside it, so the white space does not count.
        first, end = start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())
        if any(a < end and first < b for a, b in written):
            return True
    return False


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer: Any, template: str) -> dict[int, str]:
    """The tokens that steer a model, by id: all special tokens, and the other added tokens that the template writes."""
    return {
        i: str(token.content)
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace())
    }


@functools.lru_cache(maxsize=4)
def _renamed_tokenizer(tokenizer: Any, template: str) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer with secret names for its control tokens, and the secret names by the true ones.

    Each token keeps its id and its rules.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    secret = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(24))
    names = {name: f"{secret}{i}z" for i, name in control_tokens(tokenizer, template).items()}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # no merge of plain text may result in a control token
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not {"".join(pair), *pair} & names.keys()]
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state)), names


def check_tokenizer(tokenizer: Any) -> None:
    """Raises InputError where the tokenizer does not say which characters a token stands for, or has a wrong maximum length."""
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, bool) or not isinstance(limit, int | float | None):
        raise InputError(
            f"{tokenizer_name(tokenizer)}: tokenizer_config.json: model_max_length is {printable(repr(limit)[:40])}; "
            "expected a number"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{tokenizer_name(tokenizer)}: its tokenizer ({type(tokenizer).__name__}) does not tell which text a token stands "
            "for; give the model a tokenizer.json (transformers' AutoTokenizer writes one with save_pretrained)"
        )
