"""A text as tokens, in which what people or models wrote never becomes a control token.

The whole text goes through the tokenizer at once: pieces tokenised apart would gain a space with SentencePiece-like
tokenizers, and lose merges with all others. Where a written part contains the name of a control token (`<|im_end|>`), a
copy of the tokenizer is used in which every control token has a secret name, and so has each one that the template itself
wrote: the ids stay the same, and what was written is plain text.
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
    ids: list[int]
    starts: list[int]  # of each token: the characters it stands for, half-open
    ends: list[int]
    last_control: int  # the place of the last control token; 0 where there is none

    def between(self, start: int, stop: int) -> Span:
        """The half-open span of the tokens that stand for these characters, whole or in part."""
        first = bisect_left(self._last, start + 1)
        if start == stop:
            return first, first
        return first, max(first, bisect_left(self._from, stop))

    @functools.cached_property
    def _last(self) -> list[int]:
        return list(accumulate(self.ends, max))

    @functools.cached_property
    def _from(self) -> list[int]:
        return list(accumulate(self.starts, max))


def encode(tokenizer: Any, text: str, written: Sequence[Span]) -> Tokens:
    """Tokens of the whole text, no special ones added. written: the characters that must stay plain text.

    Raises Unfit where plain text cannot be kept from becoming a control token.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    control = control_tokens(tokenizer, template_of(tokenizer))
    tokens = _tokens(found["input_ids"], found["offset_mapping"], control)
    if not _forged(tokenizer, text, tokens, written):
        return tokens
    kept = _renamed(tokenizer, template_of(tokenizer))
    name = re.compile("|".join(map(re.escape, sorted(control.values(), key=len, reverse=True))))
    safe, moved = [], [0]  # moved: of each character of the safe text, where it stands in the text
    at = 0
    for start, stop in [*sorted(written), (len(text), len(text))]:
        for match in name.finditer(text, at, start):
            safe += [text[at : match.start()], kept.names[match[0]]]
            moved += [*range(at + 1, match.start() + 1)] + [match.end()] * len(kept.names[match[0]])
            at = match.end()
        safe.append(text[at:stop])
        moved += range(at + 1, stop + 1)
        at = stop
    moved[0] = 0
    again = kept.tokenizer.encode("".join(safe), add_special_tokens=False)
    tokens = _tokens(again.ids, [(moved[a], moved[b]) for a, b in again.offsets], control)
    if _forged(tokenizer, text, tokens, written):
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: the text holds a control token of this model, which cannot be kept apart",
            "control token",
        )
    return tokens


def _tokens(ids: list[int], offsets: Sequence[tuple[int, int]], control: Collection[int]) -> Tokens:
    last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in control), 0)
    return Tokens(ids, [a for a, _ in offsets], [b for _, b in offsets], last)


def _forged(tokenizer: Any, text: str, tokens: Tokens, written: Sequence[Span]) -> bool:
    """Whether a control token stands for characters that were written."""
    control = control_tokens(tokenizer, template_of(tokenizer))
    places = [i for i, token in enumerate(tokens.ids) if token in control]
    for i in places:
        if (
            tokens.ids[i] == tokenizer.unk_token_id
            and tokenizer.unk_token not in text[tokens.starts[i] : tokens.ends[i]]
        ):
            continue  # a character that the tokenizer does not know
        # Tokens that strip white space reach into the text beside them: the middle is the token's own.
        start, stop = _core(text, tokens.starts[i], tokens.ends[i])
        if any(a < stop and start < b for a, b in written):
            return True
    return False


def _core(text: str, start: int, stop: int) -> Span:
    """The span without the white space at its sides."""
    part = text[start:stop]
    return start + len(part) - len(part.lstrip()), stop - len(part) + len(part.rstrip())


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer: Any, template: str) -> dict[int, str]:
    """The tokens that steer a model: all special ones, and the other added ones that the template writes."""
    added = tokenizer.added_tokens_decoder
    return {
        i: str(token.content)
        for i, token in added.items()
        if token.special or (token.content in template and not token.content.isspace())
    }


@dataclass(frozen=True)
class _Renamed:
    tokenizer: Tokenizer
    names: dict[str, str]  # secret names by the true ones


@functools.lru_cache(maxsize=4)
def _renamed(tokenizer: Any, template: str) -> _Renamed:
    """The tokenizer with secret names for its control tokens. Each keeps its id and its rules."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    secret = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(24))
    control = control_tokens(tokenizer, template)
    names = {name: f"{secret}{i}z" for i, name in control.items()}
    for token in told["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = told["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # a control token that plain text could be merged into is no longer reached
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        model["merges"] = [list(p) for p in pairs if not {"".join(p), *p} & names.keys()]
    told["truncation"] = told["padding"] = None
    return _Renamed(Tokenizer.from_str(json.dumps(told)), names)


def check_tokenizer(tokenizer: Any) -> None:
    """Raises InputError where the tokenizer cannot say which characters a token stands for."""
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, bool) or not isinstance(limit, int | float | None):
        raise InputError(
            f"{tokenizer_name(tokenizer)}: tokenizer_config.json: model_max_length is {printable(repr(limit)[:40])}; expected a number"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{tokenizer_name(tokenizer)}: its tokenizer ({type(tokenizer).__name__}) does not tell which text a token stands for; "
            "give the model a tokenizer.json (transformers' AutoTokenizer writes one with save_pretrained)"
        )
