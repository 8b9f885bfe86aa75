"""A chat as one text, rendered by the model's own template, and where in it each message stands.

The text is exactly what `tokenizer.apply_chat_template` writes. To know which characters people or models wrote, the
template is rendered once more around placeholders (once per sequence of roles), and the two texts are laid side by side.
A template may trim what it is given; one that does anything else to it, or leaves a message out, is not believed.

A template without a system role gets the system text at the beginning of the first user turn, then an empty line, then
the user's text: what Gemma's authors recommend.
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

_MARK = "SOLONSPAN{}X"
_MARKS = re.compile(r"(SOLONSPAN\d+X)")
BETWEEN = "\n\n"  # the system text and the user's, where they share a turn
Span = tuple[int, int]  # half-open
SystemRole = Literal["message", "user turn"]  # where the system text goes


@dataclass(frozen=True)
class Rendered:
    text: str
    turns: tuple[Span, ...]  # of each message of the chat: the characters of its content
    written: tuple[Span, ...]  # all that people or models wrote, the system message included


@dataclass(frozen=True)
class _Turn:
    """What the template is given as one message, and which of the chat's messages are in it, at which characters."""

    role: str
    content: str
    holds: tuple[tuple[int, Span], ...] = ()


def render(tokenizer: Any, chat: Chat, *, system: str | None, generate: bool) -> Rendered:
    """The chat by the tokenizer's template. Raises Unfit where the template cannot render it faithfully.

    system: put first unless the chat brings its own; None or "": none is sent. generate: open the assistant's turn at the
    end. Reasoning in an assistant's message is no part of it.
    """
    turns = _turns(tokenizer, chat, system)
    text = _apply(tokenizer, [(t.role, t.content) for t in turns], generate)
    key = (tokenizer, template_of(tokenizer), tuple(t.role for t in turns), generate)
    contents = [t.content for t in turns]
    found = _aligned(text, _pieces(*key), contents)
    if found is None:  # a template that writes the date is another one after midnight
        _pieces.cache_clear()
        found = _aligned(text, _pieces(*key), contents)
    if found is None:
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: its chat template changes what a message says; the text cannot be given to this model",
            "not rendered",
        )
    last = {i: span for i, span in found}
    spans: dict[int, Span] = {}
    for i, turn in enumerate(turns):
        start, stop = last[i]
        trimmed = turn.content.find(text[start:stop])  # characters that the template took off the beginning
        for message, (a, b) in turn.holds:
            spans[message] = tuple(min(max(start + x - trimmed, start), stop) for x in (a, b))  # type: ignore[assignment]
    return Rendered(text, tuple(spans[i] for i in range(len(chat))), tuple(span for _, span in found))


def as_messages(tokenizer: Any, chat: Chat, *, system: str | None) -> list[dict[str, str]]:
    """The messages as `render` gives them to the template, for trainers that render conversations by themselves."""
    return [{"role": t.role, "content": t.content} for t in _turns(tokenizer, chat, system)]


def _turns(tokenizer: Any, chat: Chat, system: str | None) -> list[_Turn]:
    """The messages as the template gets them."""
    turns = []
    for i, m in enumerate(chat):
        content = without_reasoning(m.content) if m.role == "assistant" else m.content
        turns.append(_Turn(m.role, content, ((i, (0, len(content))),)))
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
        holds = [*first.holds, *((i, (a + len(lead), b + len(lead))) for i, (a, b) in second.holds)]
        turns[:2] = [_Turn("user", lead + second.content, tuple(holds))]
    return turns


@functools.lru_cache(maxsize=16)
def system_role(tokenizer: Any, template: str) -> SystemRole:
    """Whether the template renders a system message, or the system text must stand in the first user turn."""
    marks = [("system", _MARK.format(0)), ("user", _MARK.format(1))]
    try:
        text = _apply(tokenizer, marks, generate=True)
    except Unfit:
        return "user turn"
    return "message" if marks[0][1] in text else "user turn"


def template_of(tokenizer: Any) -> str:
    """The tokenizer's chat template. Raises InputError where it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise InputError(
            f"{tokenizer_name(tokenizer)}: its tokenizer has no chat template; use an instruct model"
        ) from None


def check_template(tokenizer: Any) -> None:
    """Raises InputError where the template cannot render a question and its answer."""
    chat = (Message(role="user", content="What is tea?"), Message(role="assistant", content="A drink."))
    for system in ("Be kind.", None):
        render(tokenizer, chat, system=system, generate=False)
        render(tokenizer, chat[:1], system=system, generate=True)


def open_reasoning(text: str) -> tuple[str, str] | None:
    """The marks of reasoning that the template has opened at the end of a text and left open."""
    end = text.rstrip()
    return next((marks for marks in OPENED_BY_TEMPLATE if end.endswith(marks[0])), None)


def tokenizer_name(tokenizer: Any) -> str:
    return printable(str(getattr(tokenizer, "name_or_path", "")) or "the model")


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]], generate: bool) -> str:
    """Raises Unfit, whatever goes wrong inside the template: it is code that others wrote."""
    template = template_of(tokenizer)
    options = {"enable_thinking": False} if "enable_thinking" in template else {}  # Qwen 3 and its kin
    try:
        text = tokenizer.apply_chat_template(
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
    return text


@functools.lru_cache(maxsize=256)
def _pieces(tokenizer: Any, template: str, roles: tuple[str, ...], generate: bool) -> tuple[int | str, ...]:
    """The chat template around messages of these roles: its own text, and each message's number where its content goes.

    `template` is the tokenizer's own, here so that another one is rendered anew.
    """
    rendered = _apply(tokenizer, [(role, _MARK.format(i)) for i, role in enumerate(roles)], generate)
    split = _MARKS.split(rendered)
    pieces = tuple(int(p[9:-1]) if _MARKS.fullmatch(p) else p for p in split if p)
    lost = [role for i, role in enumerate(roles) if i not in pieces]
    if lost:
        raise Unfit(
            f"{tokenizer_name(tokenizer)}: its chat template leaves out a message ({lost[0]}) of the turns {', '.join(roles[:8])}",
            "not rendered",
        )
    return pieces


def _aligned(text: str, pieces: Sequence[int | str], contents: Sequence[str]) -> list[tuple[int, Span]] | None:
    """Each content's place in the text, in the order of the pieces; None where the text is not made of these pieces.

    A content may have been trimmed, and with an empty one the template's own white space beside it.
    """
    options = [_trimmed(contents[p] if isinstance(p, int) else p) for p in pieces]
    tried: set[tuple[int, int]] = set()  # dead ends: piece, character
    path: list[tuple[int, int]] = []  # of each piece so far: its option, where it ends
    option, at = 0, 0
    while True:
        n = len(path)
        if n == len(pieces) and at == len(text):
            break
        if n < len(pieces) and (n, at) not in tried and option < len(options[n]):
            if text.startswith(options[n][option], at):
                at += len(options[n][option])
                path.append((option, at))
                option = 0
            else:
                option += 1
            continue
        tried.add((n, at))
        if not path:
            return None
        option = path.pop()[0] + 1
        at = path[-1][1] if path else 0
    starts = [0, *(end for _, end in path)]
    return [(p, (starts[k], starts[k + 1])) for k, p in enumerate(pieces) if isinstance(p, int)]


def _trimmed(text: str) -> list[str]:
    """The text, and what trimming makes of it."""
    return list(dict.fromkeys((text, text.strip(), text.rstrip(), text.lstrip())))
