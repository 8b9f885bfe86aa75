"""A chat as token ids: those of the whole text that the model's template writes, as the model saw it in training.

`template.py` renders the chat and marks the characters that people or models wrote. `tokens.py` makes tokens of the whole text
and keeps control tokens out of the marked characters.
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
    tokenizer: Any, chat: Chat, *, system: str | None, generate: bool = True, prefix: str = "", limit: Limit = UNLIMITED
) -> list[int]:
    """Token ids of a chat.

    system: put first, unless the chat has a system message; None or "": no system message. (Some templates insert their own
    where there is none.) generate: open the assistant's turn at the end. prefix: the first words of that turn. Raises Unfit
    where the tokens exceed the limit, or where the chat template cannot render the chat faithfully.
    """
    rendered = render(tokenizer, chat, system=system, generate=generate)
    return _encode_within(tokenizer, _append(rendered, prefix) if prefix else rendered, limit).ids


def _encode_within(tokenizer: Any, rendered: Rendered, limit: Limit) -> Tokens:
    limit.check_text(tokenizer, rendered.text)
    tokens = encode(tokenizer, rendered.text, rendered.written)
    limit.check(len(tokens.ids))
    return tokens


@dataclass(frozen=True)
class Options:
    """Answers to one chat: the tokens that all of them begin with, and the other tokens of each answer."""

    context: list[int]
    tails: tuple[list[int], ...]  # each has one token or more


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

    Each answer is tokenised with the whole text. Where an answer changes the tokens before it (`(A` may be one token), the
    context ends before those tokens. Reasoning that the template has opened is closed first, and the answer follows it.
    """
    rendered = render(tokenizer, chat, system=system, generate=True)
    marks = open_reasoning(rendered.text)
    closing = f"\n{marks[1]}\n\n" if marks else ""
    context = _append(rendered, prefix, closing)
    tokens = _encode_within(tokenizer, context, limit)
    answers = [_append(rendered, prefix + continuation + suffix, closing) for continuation in continuations]
    rows = [tokens.ids[: tokens.last_control] + ids for ids in _from_last_control(tokenizer, tokens, context, answers)]
    for ids in rows:
        limit.check(len(ids) - 1)  # the model predicts the last token and does not read it
    shared = min((_common_length(tokens.ids, ids) for ids in rows), default=len(tokens.ids))
    shared = min([shared, *(len(ids) - 1 for ids in rows)])  # an answer that adds no token gets its last one as tail
    return Options(tokens.ids[:shared], tuple(ids[shared:] for ids in rows))


def _from_last_control(tokenizer: Any, tokens: Tokens, context: Rendered, answers: list[Rendered]) -> list[list[int]]:
    """Token ids of the answers, each of which begins with the context, without those before its last control token."""
    cut = tokens.starts[tokens.last_control] if tokens.last_control else 0

    def ids_after_cut(rendered: Rendered) -> list[int]:
        written = [(max(start - cut, 0), stop - cut) for start, stop in rendered.written if stop > cut]
        return encode(tokenizer, rendered.text[cut:], written).ids

    # Most tokenizers cut a text at its control tokens first. Where this one does not, the whole text is tokenised again.
    if cut and ids_after_cut(context) == tokens.ids[tokens.last_control :]:
        return [ids_after_cut(answer) for answer in answers]
    return [encode(tokenizer, answer.text, answer.written).ids[tokens.last_control :] for answer in answers]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands inside another text: without control tokens, and without a space before it."""
    whole = "\n" + text
    ids, before = (encode(tokenizer, part, [(0, len(part))]).ids for part in (whole, "\n"))
    return ids[_common_length(ids, before) :]


def _append(rendered: Rendered, text: str, closing: str = "") -> Rendered:
    """The rendered text, then `closing` (which ends its reasoning), then the assistant's first words."""
    start = len(rendered.text) + len(closing)
    span = (start, start + len(text))
    return Rendered(rendered.text + closing + text, rendered.turns, (*rendered.written, span))


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that two texts begin with in common."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def chat_ids_and_turns(
    tokenizer: Any, chat: Chat, *, system: str | None, limit: Limit = UNLIMITED
) -> tuple[list[int], list[Span]]:
    """Token ids of a whole chat, and for each message of `chat` the half-open span of its tokens.

    limit: checked against the length of the text before it is tokenised. The caller knows which tokens it needs, and checks
    their number. A span includes the end-of-turn token after the message, because the assistant must learn to write it.
    """
    rendered = render(tokenizer, chat, system=system, generate=False)
    limit.check_text(tokenizer, rendered.text)
    tokens = encode(tokenizer, rendered.text, rendered.written)
    return tokens.ids, [_span_with_end(tokenizer, rendered.text, tokens, span) for span in rendered.turns]


def _span_with_end(tokenizer: Any, text: str, written: Tokens, characters: Span) -> Span:
    """The tokens of a message and the end token of its turn, which may follow white space that the template writes."""
    start, stop = written.between(*characters)
    for index in range(stop, len(written.ids)):
        if written.ids[index] in end_ids(tokenizer):
            return start, index + 1
        if text[written.starts[index] : written.ends[index]].strip():
            break
    return start, stop


@functools.lru_cache(maxsize=16)
def end_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end the assistant's turn."""
    ids = {tokenizer.convert_tokens_to_ids(token) for token in TURN_ENDS} - {tokenizer.unk_token_id}
    return frozenset((ids | {tokenizer.eos_token_id}) - {None})


@functools.lru_cache(maxsize=16)
def _opening_mark(tokenizer: Any, template: str) -> str:
    """The mark of reasoning that the template opens before an answer, or an empty text."""
    marks = open_reasoning(render(tokenizer, (user("a question"),), system=None, generate=True).text)
    return marks[0] if marks else ""


@functools.lru_cache(maxsize=16)
def _special_tokens(tokenizer: Any) -> tuple[frozenset[str], frozenset[int]]:
    """The names of the special tokens, and the ids of those that are marks of reasoning."""
    special = {str(token.content): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {name for pair in MARKS for name in pair} | {"<|channel|>"}
    return frozenset(special), frozenset(i for name, i in special.items() if name in marks)


def answer_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, bool]:
    """The answer in the tokens that a model generated after a chat, and whether they are reasoning without an answer.

    Special tokens and reasoning are not part of the answer.
    """
    names, marks = _special_tokens(tokenizer)
    skip = marks.isdisjoint(ids)  # special tokens that are marks of reasoning are needed to find the answer
    text = _opening_mark(tokenizer, template_of(tokenizer)) + tokenizer.decode(ids, skip_special_tokens=skip)
    answer = without_reasoning(text)
    for name in () if skip else names:
        answer = answer.replace(name, "")
    return answer.strip(), not answer.strip() and bool(text.strip())


def template_fingerprint(tokenizer: Any, system: str | None) -> str:
    """A fingerprint of the chat template, Solon's system message, and the way in which the message is sent."""
    template = template_of(tokenizer)
    return fingerprint("chat", template, system or None, system_role(tokenizer, template) if system else None)
