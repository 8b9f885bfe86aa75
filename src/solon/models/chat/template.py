"""A chat as one text, rendered by the model's own template, with the characters of each message.

The text is what `tokenizer.apply_chat_template` writes. To find the characters that people or models wrote, the template is
rendered again with placeholders (once for each sequence of roles), and the two texts are compared. A template may trim a
message. A template that changes a message in another way, or leaves it out, is refused.

Where a template has no system role, the system text stands at the beginning of the first user turn, followed by an empty line
and the user's text, as Gemma's authors recommend.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from solon.errors import InputError, Unfit, printable
from solon.models.chat.reasoning import OPENED_BY_TEMPLATE, without_reasoning
from solon.records import Chat, Message

_PLACEHOLDER = "SOLONSPAN{}X"
_PLACEHOLDERS = re.compile(r"SOLONSPAN(\d+)X")
BETWEEN = "\n\n"  # between the system text and the user's text in one turn
Span = tuple[int, int]  # half-open
SystemRole = Literal["message", "user turn"]  # where the system text stands


@dataclass(frozen=True)
class Rendered:
    """A chat as one text."""

    text: str
    turns: tuple[Span, ...]  # for each message of the chat, the characters of its content
    written: tuple[Span, ...]  # the characters that people or models wrote, the system message included


@dataclass(frozen=True)
class _Turn:
    """One message for the template. holds: which messages of the chat are in its content, and at which characters."""

    role: str
    content: str
    holds: tuple[tuple[int, Span], ...] = ()


def render(tokenizer: Any, chat: Chat, *, system: str | None, generate: bool) -> Rendered:
    """The chat rendered by the tokenizer's template. Raises Unfit where the template cannot render it faithfully.

    system: put first unless the chat has a system message; None or "": no system message. generate: open the assistant's turn
    at the end. The reasoning in an assistant's message is left out.
    """
    turns = _turns(tokenizer, chat, system)
    text = _apply(tokenizer, [(turn.role, turn.content) for turn in turns], generate)
    key = (tokenizer, template_of(tokenizer), tuple(turn.role for turn in turns), generate)
    contents = [turn.content for turn in turns]
    located = _locate(text, _pieces(*key), contents)
    if located is None:  # a template that writes the date changes at midnight
        _pieces.cache_clear()
        located = _locate(text, _pieces(*key), contents)
    if located is None:
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: its chat template changes what a message says; the text cannot be given to this "
            "model",
            "not rendered",
        )
    last = dict(located)
    spans: dict[int, Span] = {}
    for i, turn in enumerate(turns):
        start, stop = last[i]
        shift = start - turn.content.find(text[start:stop])  # the template may have trimmed the beginning
        for message, (first, end) in turn.holds:
            spans[message] = min(max(first + shift, start), stop), min(max(end + shift, start), stop)
    return Rendered(text, tuple(spans[i] for i in range(len(chat))), tuple(span for _, span in located))


def as_messages(tokenizer: Any, chat: Chat, *, system: str | None) -> list[dict[str, str]]:
    """The messages as `render` gives them to the template, for trainers that render conversations themselves."""
    return [{"role": turn.role, "content": turn.content} for turn in _turns(tokenizer, chat, system)]


def _turns(tokenizer: Any, chat: Chat, system: str | None) -> list[_Turn]:
    turns = []
    for i, message in enumerate(chat):
        content = without_reasoning(message.content) if message.role == "assistant" else message.content
        turns.append(_Turn(message.role, content, ((i, (0, len(content))),)))
    if system and (not turns or turns[0].role != "system"):
        turns.insert(0, _Turn("system", system))
    if turns and turns[0].role == "system" and system_role(tokenizer, template_of(tokenizer)) == "user turn":
        if len(turns) < 2 or turns[1].role != "user":
            raise Unfit(
                f"{tokenizer_name(tokenizer)}: its chat template has no system role, and the chat has no user turn first that "
                'could hold the system text; send none with --system ""',
                "not rendered",
            )
        first, second = turns[:2]
        lead = first.content + BETWEEN if first.content else ""
        shifted = ((i, (start + len(lead), stop + len(lead))) for i, (start, stop) in second.holds)
        turns[:2] = [_Turn("user", lead + second.content, (*first.holds, *shifted))]
    return turns


@functools.lru_cache(maxsize=16)
def system_role(tokenizer: Any, template: str) -> SystemRole:
    """Whether the template renders a system message, or the system text must stand in the first user turn."""
    system = _PLACEHOLDER.format(0)
    try:
        text = _apply(tokenizer, [("system", system), ("user", _PLACEHOLDER.format(1))], generate=True)
    except Unfit:
        return "user turn"
    return "message" if system in text else "user turn"


def template_of(tokenizer: Any) -> str:
    """The tokenizer's chat template. Raises InputError where it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise InputError(f"{tokenizer_name(tokenizer)}: has no chat template; use an instruct model") from None


def check_template(tokenizer: Any) -> None:
    """Raises Unfit where the template cannot render a question and its answer."""
    chat = (Message(role="user", content="What is tea?"), Message(role="assistant", content="A drink."))
    for system in ("Be kind.", None):
        render(tokenizer, chat, system=system, generate=False)
        render(tokenizer, chat[:1], system=system, generate=True)


def open_reasoning(text: str) -> tuple[str, str] | None:
    """The pair of marks, where the template has opened reasoning at the end of a text and has not closed it."""
    end = text.rstrip()
    return next((marks for marks in OPENED_BY_TEMPLATE if end.endswith(marks[0])), None)


def tokenizer_name(tokenizer: Any) -> str:
    """The name or path of the tokenizer's model, for messages."""
    return printable(str(getattr(tokenizer, "name_or_path", "")) or "the model")


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]], generate: bool) -> str:
    """The text of (role, content) messages. Raises Unfit for any error inside the template, which others wrote."""
    template = template_of(tokenizer)
    options = {"enable_thinking": False} if "enable_thinking" in template else {}  # Qwen 3 and models after it
    try:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=generate,
            **options,
        )
    except Exception as error:
        roles = ", ".join(role for role, _ in messages[:8]) + (", …" if len(messages) > 8 else "")
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: its chat template cannot render the turns {roles or '(none)'} "
            f"({printable(str(error) or type(error).__name__, 160)})",
            "not rendered",
        ) from error


@functools.lru_cache(maxsize=256)
def _pieces(tokenizer: Any, template: str, roles: tuple[str, ...], generate: bool) -> tuple[int | str, ...]:
    """The template around messages of these roles: its own text, and a message's number where its content stands.

    template: part of the cache's key, because the tokenizer's template may change.
    """
    rendered = _apply(tokenizer, [(role, _PLACEHOLDER.format(i)) for i, role in enumerate(roles)], generate)
    split = _PLACEHOLDERS.split(rendered)  # the template's text and the numbers of the messages in turn
    pieces = tuple(int(part) if k % 2 else part for k, part in enumerate(split) if part)
    lost = [role for i, role in enumerate(roles) if i not in pieces]
    if lost:
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: its chat template leaves out a message ({lost[0]}) of the turns "
            f"{', '.join(roles[:8])}",
            "not rendered",
        )
    return pieces


def _locate(text: str, pieces: Sequence[int | str], contents: Sequence[str]) -> list[tuple[int, Span]] | None:
    """The number and the span of each content, in the order of the pieces; None where the text does not consist of them.

    A content may be trimmed. Where it is empty, the template's own white space beside it may be trimmed.
    """
    options = [_trimmed(contents[piece] if isinstance(piece, int) else piece) for piece in pieces]
    fits = [{len(text)}]  # for each piece, from the last one: the characters from which the rest of the text fits
    for choices in reversed(options):
        fits.append({end - len(c) for end in fits[-1] for c in choices if text.endswith(c, 0, end)})
    if 0 not in fits.pop():
        return None
    spans, start = [], 0
    for choices in options:
        ends = fits.pop()
        stop = next(start + len(c) for c in choices if text.startswith(c, start) and start + len(c) in ends)
        spans.append((start, stop))
        start = stop
    return [(piece, span) for piece, span in zip(pieces, spans, strict=True) if isinstance(piece, int)]


def _trimmed(text: str) -> list[str]:
    """The text, and the results of trimming it."""
    return list(dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip())))
