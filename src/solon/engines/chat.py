"""A chat as token ids, with what people and models wrote kept apart from what the template wrote.

Rendered as one string, a response that contains `<|im_end|>` would become real control tokens. Here the
template is rendered around placeholders, and each message's text is tokenised on its own with control tokens
switched off; the pieces are then joined.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from solon.records import Chat, Message, fingerprint

_MARK = "SOLONSPAN{}X"
_MARKS = re.compile(r"(SOLONSPAN\d+X)")


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of untrusted text: no control tokens come out of it."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_ids(tokenizer: Any, chat: Chat, *, system: str | None, generate: bool = True, prefix: str = "") -> list[int]:
    """Token ids of a chat.

    chat: messages in order; `system` is put first unless the chat brings its own (some templates insert a
    system message of their own when there is none, so one is always sent).
    generate: open the assistant's turn at the end; `prefix` is then its first words.
    """
    ids, _ = chat_ids_and_turns(tokenizer, chat, system=system, generate=generate)
    return ids + (text_ids(tokenizer, prefix) if prefix else [])


def chat_ids_and_turns(
    tokenizer: Any, chat: Chat, *, system: str | None, generate: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and for each message of `chat` the half-open span of its text in them.

    The span of an assistant's message includes the end-of-turn token after it: that is what it must learn to say.
    """
    offset = 0
    messages = list(chat)
    if system is not None and (not messages or messages[0].role != "system"):
        messages, offset = [Message(role="system", content=system), *messages], 1
    ids: list[int] = []
    spans: dict[int, tuple[int, int]] = {}
    opened: int | None = None
    ends = end_ids(tokenizer)
    for piece in _pieces(tokenizer, tokenizer.chat_template, tuple(m.role for m in messages), generate):
        if isinstance(piece, int):
            new = text_ids(tokenizer, messages[piece].content)
            spans[piece] = (len(ids), len(ids) + len(new))
            ids += new
            opened = piece
        else:
            if opened is not None and piece and piece[0] in ends:
                start, stop = spans[opened]
                spans[opened] = (start, stop + 1)
            ids += piece
            opened = None
    missing = [i for i in range(offset, len(messages)) if i not in spans]
    if missing:
        raise ValueError(f"the chat template dropped message {missing[0] - offset} ({messages[missing[0]].role})")
    return ids, [spans[i] for i in range(offset, len(messages))]


@functools.lru_cache(maxsize=256)
def _pieces(tokenizer: Any, template: str, roles: tuple[str, ...], generate: bool) -> tuple[int | list[int], ...]:
    """The chat template around messages of these roles: token ids, and each message's number where its text goes.

    `template` is the tokenizer's own, here so that another one is rendered anew.
    """
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)],
        tokenize=False,
        add_generation_prompt=generate,
    )
    pieces: list[int | list[int]] = []
    for piece in _MARKS.split(rendered):
        if _MARKS.fullmatch(piece):
            pieces.append(int(piece[9:-1]))
        elif piece:
            pieces.append(tokenizer(piece, add_special_tokens=False)["input_ids"])
    return tuple(pieces)


@functools.lru_cache(maxsize=16)
def end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that end the assistant's turn."""
    ids = {tokenizer.eos_token_id}
    for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
        found = tokenizer.convert_tokens_to_ids(token)
        if found is not None and found != tokenizer.unk_token_id:
            ids.add(found)
    ids.discard(None)
    return frozenset(ids)


def template_fingerprint(tokenizer: Any, system: str | None) -> str:
    """Changes when the chat template or Solon's system message does."""
    return fingerprint("chat", tokenizer.chat_template, system)
