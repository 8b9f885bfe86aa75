"""A chat as token ids: those of the whole text that the model's template writes, as the model saw it in training.

`template.py` renders the chat and says which characters people or models wrote; `tokens.py` makes tokens of the whole text
and keeps control tokens out of those characters; here the two meet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from solon.models.chat.limits import UNLIMITED, Limit
from solon.models.chat.reasoning import MARKS, without_reasoning
from solon.models.chat.template import Rendered, Span, open_reasoning, render, system_role, template_of
from solon.models.chat.tokens import Tokens, encode
from solon.records import Chat, fingerprint, user

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def chat_ids(
    tokenizer: Any,
    chat: Chat,
    *,
    system: str | None,
    generate: bool = True,
    prefix: str = "",
    limit: Limit = UNLIMITED,
) -> list[int]:
    """Token ids of a chat. Raises Unfit where they are too many, or the chat template cannot render it faithfully.

    chat: messages in order; `system` is put first unless the chat brings its own (some templates insert a system message of
    their own when there is none, so one is always sent); None or "" sends none.
    generate: open the assistant's turn at the end; `prefix` is then its first words.
    """
    rendered = render(tokenizer, chat, system=system, generate=generate)
    if prefix:
        rendered = _continued(rendered, prefix)
    return _encoded(tokenizer, rendered, limit).ids


def _encoded(tokenizer: Any, rendered: Rendered, limit: Limit) -> Tokens:
    limit.check_text(tokenizer, rendered.text)
    tokens = encode(tokenizer, rendered.text, rendered.written)
    limit.check(len(tokens.ids))
    return tokens


@dataclass(frozen=True)
class Options:
    """Answers to one chat: tokens that all of them begin with, then each answer's own."""

    context: list[int]
    tails: tuple[list[int], ...]  # at least one token each


def option_ids(
    tokenizer: Any,
    chat: Chat,
    continuations: Sequence[str],
    *,
    system: str | None,
    prefix: str = "",
    suffix: str = "",
    limit: Limit = UNLIMITED,
) -> Options:
    """Token ids of a chat that is answered with `prefix`, one of `continuations`, and `suffix`.

    Each answer is tokenised with the whole text. Where it changes the tokens before it (`(A` may be one token), the context
    ends before those. Reasoning that the template has opened is closed first: the answer stands after it.
    """
    rendered = render(tokenizer, chat, system=system, generate=True)
    marks = open_reasoning(rendered.text)
    closing = f"\n{marks[1]}\n\n" if marks else ""
    begun = _continued(rendered, prefix, closing)
    base = _encoded(tokenizer, begun, limit)
    rest = [_continued(rendered, prefix + c + suffix, closing) for c in continuations]
    answers = [base.ids[: base.last_control] + ids for ids in _from_last_control(tokenizer, base, begun, rest)]
    for ids in answers:
        limit.check(len(ids) - 1)  # the last token is foretold, not read
    shared = min((_alike(base.ids, ids) for ids in answers), default=len(base.ids))
    shared = min([shared, *(len(ids) - 1 for ids in answers)])  # of an answer that adds nothing, its last token
    return Options(base.ids[:shared], tuple(ids[shared:] for ids in answers))


def _from_last_control(tokenizer: Any, base: Tokens, begun: Rendered, rest: Sequence[Rendered]) -> list[list[int]]:
    """Token ids of texts that begin as `begun` does, without the tokens before its last control token."""
    cut = base.starts[base.last_control] if base.last_control else 0

    def after(rendered: Rendered) -> list[int]:
        written = [(max(a - cut, 0), b - cut) for a, b in rendered.written if b > cut]
        return encode(tokenizer, rendered.text[cut:], written).ids

    # A tokenizer cuts a text at its control tokens first; where this one does not, the whole text is read again.
    if cut and after(begun) == base.ids[base.last_control :]:
        return [after(r) for r in rest]
    return [encode(tokenizer, r.text, r.written).ids[base.last_control :] for r in rest]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands inside another one: no control tokens, and no space put before it."""
    whole = "\n" + text
    ids, before = (encode(tokenizer, t, [(0, len(t))]).ids for t in (whole, "\n"))
    return ids[_alike(ids, before) :]


def _continued(rendered: Rendered, text: str, closing: str = "") -> Rendered:
    """The rendered text, what closes its reasoning, and the assistant's first words after it."""
    start = len(rendered.text) + len(closing)
    span = (start, start + len(text))
    return Rendered(rendered.text + closing + text, rendered.turns, (*rendered.written, span))


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def chat_ids_and_turns(
    tokenizer: Any, chat: Chat, *, system: str | None, generate: bool = False, limit: Limit = UNLIMITED
) -> tuple[list[int], list[Span]]:
    """Token ids, and for each message of `chat` the half-open span of its text in them.

    limit: of the text's length, which is looked at before the text is tokenised; counting tokens is the caller's, who
    knows which of them are needed.
    A span includes the end-of-turn token after the text: that is what the assistant must learn to say.
    """
    rendered = render(tokenizer, chat, system=system, generate=generate)
    limit.check_text(tokenizer, rendered.text)
    tokens = encode(tokenizer, rendered.text, rendered.written)
    return tokens.ids, [_with_end(tokenizer, rendered.text, tokens, span) for span in rendered.turns]


def _with_end(tokenizer: Any, text: str, tokens: Tokens, written: Span) -> Span:
    """The tokens of a message, and what ends its turn: an end token, after white space that the template writes."""
    start, stop = tokens.between(*written)
    at = stop
    while at < len(tokens.ids) and tokens.ids[at] not in end_ids(tokenizer):
        if text[tokens.starts[at] : tokens.ends[at]].strip():
            return start, stop
        at += 1
    return start, min(at + 1, len(tokens.ids)) if at < len(tokens.ids) else stop


@functools.lru_cache(maxsize=16)
def end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that end the assistant's turn."""
    ids = {tokenizer.eos_token_id}
    for token in TURN_ENDS:
        found = tokenizer.convert_tokens_to_ids(token)
        if found is not None and found != tokenizer.unk_token_id:
            ids.add(found)
    ids.discard(None)
    return frozenset(ids)


@functools.lru_cache(maxsize=16)
def _opened(tokenizer: Any, template: str) -> str:
    """The mark of reasoning that the template opens before an answer, or nothing."""
    marks = open_reasoning(render(tokenizer, (user("a question"),), system=None, generate=True).text)
    return marks[0] if marks else ""


@functools.lru_cache(maxsize=16)
def _special(tokenizer: Any) -> tuple[frozenset[str], frozenset[int]]:
    """The names of the special tokens, and the ids of those that are marks of reasoning."""
    special = {str(token.content): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {name for pair in MARKS for name in pair} | {"<|channel|>"}
    return frozenset(special), frozenset(i for name, i in special.items() if name in marks)


def answer_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, bool]:
    """The answer in what a model generated after a chat, and whether there was reasoning and nothing else.

    Special tokens and reasoning are no part of the answer.
    """
    names, marks = _special(tokenizer)
    shown = marks.isdisjoint(ids)  # where a mark of reasoning is a special token it must be seen first
    said = _opened(tokenizer, template_of(tokenizer)) + tokenizer.decode(ids, skip_special_tokens=shown)
    answer = without_reasoning(said)
    for name in () if shown else names:
        answer = answer.replace(name, "")
    return answer.strip(), not answer.strip() and bool(said.strip())


def template_fingerprint(tokenizer: Any, system: str | None) -> str:
    """Changes when the chat template, Solon's system message or the way it is sent does."""
    template = template_of(tokenizer)
    return fingerprint("chat", template, system or None, system_role(tokenizer, template) if system else None)
