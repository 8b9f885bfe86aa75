"""Conversations from the forms of the field's files, as one form: messages with a role and a text.

The forms are a text, an HH transcript, a message, and a list of messages (`role`/`content`, with content as a text or as
parts; ShareGPT's `from`/`value`). A `system` field of the row is the first message where the conversation has no system
message. A preference row gives the whole conversation: the turns that both sides share are the prompt, and
the sides differ only in the assistant's last turn. A user's turn is never judged.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from solon.errors import nearest
from solon.records import Chat, Message, assistant, user

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_TRANSCRIPT = re.compile(r"\s*(Human|Assistant):")
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
SOURCES = ("red_team", "helpful")  # values of `source` that steer a run
META_COLUMNS = ("subset", "prompt_id", "score_chosen", "score_rejected")  # columns of other data sets, kept in `meta`


class Sides(NamedTuple):
    """One comparison of a preference row. suffix: added to the row's id, where the row gives several comparisons."""

    prompt: Chat
    chosen: Chat  # the assistant's last turn
    rejected: Chat
    suffix: str = ""


def parse_transcript(text: str) -> Chat:
    """An HH transcript (`\\n\\nHuman: … \\n\\nAssistant: …`) as messages. Raises ValueError if it is none."""
    pieces = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError('not an HH transcript: it must start with "Human:"')
    merged: list[Message] = []
    for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        turn = (user if speaker == "Human" else assistant)(text.strip())
        if merged and merged[-1].role == turn.role:  # the released data has a few turns split in two
            turn = Message(role=turn.role, content=f"{merged.pop().content}\n\n{turn.content}")
        merged.append(turn)
    return tuple(merged)


def normalised(value: dict[str, Any]) -> dict[str, Any]:
    """A row with its id as a text, and with the columns of other data sets in `meta`."""
    row = dict(value)
    name = row.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        row["id"] = str(name)
    elif name is None:
        row.pop("id", None)
    elif not isinstance(name, str):
        raise ValueError(f"id: a {type(name).__name__}; expected a text")
    meta = {} if row.get("meta") is None else row["meta"]
    if not isinstance(meta, dict):
        raise ValueError(f"meta: a {type(meta).__name__}; expected an object")
    columns = {key: row[key] for key in META_COLUMNS if row.get(key) is not None}
    if row.get("source") is not None and row["source"] not in SOURCES:
        columns["source"] = row.pop("source")
    if isinstance(row.get("chosen_model"), str) and isinstance(row.get("rejected_model"), str):
        row.setdefault("authors", [row["chosen_model"], row["rejected_model"]])
    row["meta"] = {**columns, **meta}
    return row


def conversation(value: Any, name: str, *, plain: str = "", system: Any = None) -> Chat:
    """The messages in `value`.

    name: the key of `value` in the row. plain: the role of a text that is no transcript. system: the row's `system`
    field, put first where the conversation has no system message. Raises ValueError for a value that is no
    conversation.
    """
    if isinstance(value, str):
        is_plain = plain and not _TRANSCRIPT.match(value)
        chat = (Message.model_validate({"role": plain, "content": value}),) if is_plain else parse_transcript(value)
    else:
        messages = [value] if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise ValueError(f'"{name}" is {_kind_of(value)}; expected a text or a list of messages')
        if not messages:
            raise ValueError(f'"{name}" is an empty list; expected messages')
        chat = tuple(_message(m, f"{name}.{n}") for n, m in enumerate(messages))
    return _with_system(chat, system)


def _with_system(chat: Chat, system: Any) -> Chat:
    if isinstance(system, str) and system.strip() and all(m.role != "system" for m in chat):
        return (Message(role="system", content=system), *chat)
    return chat


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {_kind_of(value)}; expected a message with role and content")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if role is None:
        raise ValueError(f'{name}: no "role"; expected system, user or assistant')
    if not isinstance(role, str) or role not in ROLES:
        known = ["system", "user", "assistant"]
        hint = nearest(role, known) if isinstance(role, str) else ""
        raise ValueError(f"{name}: role {str(role)[:40]!r} is not read; the roles are {', '.join(known)}{hint}")
    if isinstance(content, list):
        content = _joined(content, name)
    if content is None and value.get("tool_calls"):
        raise ValueError(f"{name}: a tool call without text, which is not read; leave the message out")
    if not isinstance(content, str):
        raise ValueError(f"{name}: its content is {_kind_of(content)}; expected a text")
    return Message.model_validate({"role": ROLES[role], "content": content})


def _joined(parts: list[Any], name: str) -> str:
    """The text of a content that comes in parts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind_of(part)
            raise ValueError(f"{name}: a part of its content is no text ({str(kind)[:40]}); only text is read")
        texts.append(part["text"])
    return "".join(texts)


def prompt_of(value: dict[str, Any]) -> Chat:
    """The row's prompt, up to the user's turn: a text, a transcript, messages, or an instruction with its input."""
    if "prompt" in value:
        chat = conversation(value["prompt"], "prompt", plain="user", system=value.get("system"))
    elif "instruction" in value:
        texts = [value["instruction"], value.get("input") or ""]
        if not all(isinstance(t, str) for t in texts):
            raise ValueError('"instruction" and "input" must be texts')
        chat = _with_system((user("\n\n".join(t for t in texts if t)),), value.get("system"))
    else:
        raise ValueError('no "prompt"; expected {"prompt": "text"} or {"prompt": [{"role", "content"}, …]}')
    if isinstance(value.get("prompt"), str):  # a transcript may end with "Assistant:", where the answer would begin
        chat = without_answer(chat)
    return _check_prompt(chat)


def _check_prompt(chat: Chat) -> Chat:
    if not chat or chat[-1].role != "user":
        raise ValueError("a prompt must end with a user turn")
    if not chat[-1].content.strip():
        raise ValueError("the last user turn of the prompt is empty")
    return chat


def without_answer(chat: Chat) -> Chat:
    return chat[:-1] if chat and chat[-1].role == "assistant" else chat


def last_answers(value: dict[str, Any], expected: str) -> list[Sides]:
    """The comparisons of a preference row: several where a side is a list of texts (RewardBench 2)."""
    for key in ("chosen", "rejected"):
        if key not in value:
            raise ValueError(f'no "{key}"; {expected}')
        if value[key] is None:
            raise ValueError(f'"{key}" is null; expected a text or a list of messages')
    many = [v if isinstance(v, list) and v and all(isinstance(t, str) for t in v) else [v] for v in
            (value["chosen"], value["rejected"])]  # fmt: skip
    several = len(many[0]) * len(many[1]) > 1
    return [
        _sides({**value, "chosen": a, "rejected": b}, f"/{i}-{j}" if several else "")
        for i, a in enumerate(many[0])
        for j, b in enumerate(many[1])
    ]


def _sides(value: dict[str, Any], suffix: str) -> Sides:
    """The whole conversation of each side, with the prompt before it unless the side holds it."""
    prompt: Chat = ()
    if value.get("prompt") is not None or value.get("instruction") is not None:
        prompt = prompt_of(value)
    elif "conversations" in value:
        prompt = conversation(value["conversations"], "conversations", system=value.get("system"))
    chosen, rejected = (_whole(prompt, value, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected do not share their prompt: only the assistant's last turn may differ")
    return Sides(_check_prompt(chosen[:-1]), chosen[-1:], rejected[-1:], suffix)


def _whole(prompt: Chat, value: dict[str, Any], key: str) -> Chat:
    side = conversation(
        value[key], key, plain="assistant" if prompt else "", system=None if prompt else value.get("system")
    )
    if side[0].role == "user":  # a whole conversation, which has the system message of its prompt
        side = (*(m for m in prompt if m.role == "system"), *side)
    if side[-1].role != "assistant":
        raise ValueError(f"\"{key}\" must end with the assistant's turn; it ends with the {side[-1].role}'s")
    if not prompt or _begins_with(side, prompt):
        return side
    if side[0].role == "system" and len(side) > 1:
        side, prompt = side[1:], (side[0], *(m for m in prompt if m.role != "system"))
        if _begins_with(side, prompt[1:]):
            return (prompt[0], *side)
    if side[0].role != "assistant":
        raise ValueError(f'"{key}" begins with a {side[0].role} turn, but not with the prompt; give one or the other')
    return (*prompt, *side)


def _begins_with(side: Chat, prompt: Chat) -> bool:
    """Whether a side holds the prompt itself; white space around the texts does not count."""

    def plain(chat: Chat) -> list[tuple[str, str]]:
        return [(m.role, m.content.strip()) for m in chat]

    return len(side) > len(prompt) and plain(side[: len(prompt)]) == plain(prompt)


def completions_of(value: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    """UltraFeedback's own form: the responses to an instruction, and who wrote them."""
    rows = value["completions"]
    if not isinstance(rows, list) or len(rows) < 2:
        raise ValueError('"completions" must be a list of two or more responses')
    texts = [row if isinstance(row, str) else row.get("response", row.get("text")) if isinstance(row, dict) else None
             for row in rows]  # fmt: skip
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('each of "completions" must be a text, or have its text in "response"')
    authors = [row["model"] for row in rows if isinstance(row, dict) and isinstance(row.get("model"), str)]
    return [str(text) for text in texts], authors if len(authors) == len(rows) else None


def _kind_of(value: Any) -> str:
    """The kind of a JSON value, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
