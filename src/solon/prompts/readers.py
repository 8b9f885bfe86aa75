"""Readers of the field's formats: Solon's own, TRL conversational and preference, HH transcripts, plain JSONL.

Every wrong line is named by file and line number, with what was expected.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from solon.errors import InputError
from solon.prompts.shipped import shipped_path
from solon.records import (
    Candidates,
    Chat,
    Comparison,
    Message,
    Pair,
    Prompt,
    RevisionChain,
    SFTExample,
    assistant,
    fingerprint,
    user,
)

T = TypeVar("T")
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
MAX_LINE = 4 << 20  # bytes: a longer line is not one record


def read_jsonl(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a .jsonl or .jsonl.gz file; place is "FILE:LINE". Blank lines are passed over."""
    path = shipped_path(name)
    if not path.is_file():
        raise InputError(f"{name}: no such file; give a .jsonl or .jsonl.gz file, or a name such as solon:red-team")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    raise InputError(f"{place}: the line is longer than {MAX_LINE >> 20} MiB; one JSON object a line")
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise InputError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{place}: not JSON ({error.msg} at column {error.colno}); one JSON object a line"
                    ) from error
                if not isinstance(value, dict):
                    raise InputError(f"{place}: a {type(value).__name__}; expected a JSON object")
                yield place, value
    except gzip.BadGzipFile as error:
        raise InputError(f"{path}: its name ends in .gz but it is not gzip-compressed") from error


def parse_transcript(text: str) -> Chat:
    """An HH transcript (`\\n\\nHuman: … \\n\\nAssistant: …`) as messages. Raises ValueError if it is none."""
    pieces = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError('not an HH transcript: it must start with "Human:"')
    turns = [
        (user if who == "Human" else assistant)(said.strip())
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    merged: list[Message] = []
    for turn in turns:  # the released data has a few turns split in two
        if merged and merged[-1].role == turn.role:
            turn = Message(role=turn.role, content=f"{merged.pop().content}\n\n{turn.content}")
        merged.append(turn)
    return tuple(merged)


def read_prompts(name: str) -> list[Prompt]:
    """Prompts: Solon's form, `{"prompt": "text"}`, an HH transcript, or `messages` (TRL) up to the last user turn."""

    def one(value: dict[str, Any]) -> Prompt:
        value = dict(value)
        if "prompt" not in value and "messages" in value:
            turns = list(value["messages"])
            while turns and turns[-1].get("role") == "assistant":
                turns.pop()
            value["prompt"] = turns
        if "prompt" not in value and "chosen" in value:
            value["prompt"] = _without_answer(_chat(value["chosen"]))
        if "prompt" not in value:
            raise ValueError('no "prompt"; expected {"prompt": "text"} or {"prompt": [{"role", "content"}, …]}')
        if isinstance(value["prompt"], str) and re.match(r"\s*Human:", value["prompt"]):
            value["prompt"] = _without_answer(parse_transcript(value["prompt"]))
        return Prompt.model_validate(value)

    return _unique(_read(name, one), name)


def read_demonstrations(name: str) -> list[SFTExample]:
    """Demonstrations: TRL conversational `messages`, `{"prompt", "completion"}`, or an HH transcript in `text`."""

    def one(value: dict[str, Any]) -> SFTExample:
        if "messages" in value:
            messages: Any = value["messages"]
        elif "completion" in value and "prompt" in value:
            messages = (*_prompt(value["prompt"]), *_answer(value["completion"]))
        elif "text" in value or "chosen" in value:
            messages = _chat(value.get("text", value.get("chosen")))
        else:
            raise ValueError('no "messages"; expected {"messages": [{"role", "content"}, …]}')
        example = SFTExample.model_validate({**value, "messages": messages})
        if not any(m.role == "assistant" and m.content.strip() for m in example.messages):
            raise ValueError("no assistant turn to learn from")
        return example if example.id else example.model_copy(update={"id": _id(example.messages)})

    return _unique(_read(name, one), name)


def read_revision_chains(name: str) -> list[RevisionChain]:
    """Revision chains in Solon's form."""
    return _unique(_read(name, lambda v: RevisionChain.model_validate({"id": _id(v.get("prompt")), **v})), name)


def read_comparisons(name: str) -> list[Comparison]:
    """Comparisons: TRL preference (with or without Solon's `label`), or HH `chosen`/`rejected` transcripts.

    Without a `label` the choice is taken as certain; without a `labeler` as a person's.
    """

    def one(value: dict[str, Any]) -> Comparison:
        missing = [k for k in ("chosen", "rejected") if k not in value]
        if missing:
            raise ValueError(f'no "{missing[0]}"; expected {{"prompt", "chosen", "rejected"}}')
        prompt, chosen, rejected = _sides(value)
        label = value.get("label", None if value.get("abstained") else 1.0)
        return Comparison.model_validate(
            {
                "labeler": "human",
                **value,
                "id": value.get("id") or _id([prompt, chosen, rejected]),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "label": label,
            }
        )

    return _unique(_read(name, one), name)


def read_pairs(name: str) -> list[Pair]:
    """Pairs to compare: `{"prompt", "responses": [a, b]}`, TRL preference, or HH transcripts.

    What a person chose stays known as `human`, to measure a judge against; no judge sees it.
    """

    def one(value: dict[str, Any]) -> Pair:
        made = _candidates(value)
        if isinstance(made, Candidates):
            raise ValueError('"responses" must be a list of two texts')
        return made

    return _unique(_read(name, one), name)


def stream_pairs(name: str) -> Iterator[Pair | Candidates]:
    """As `read_pairs`, one at a time and in flat memory; more than two responses to a prompt are Candidates."""
    for place, value in read_jsonl(name):
        with _told(place):
            made = _candidates(value)
        yield made


def _candidates(value: dict[str, Any]) -> Pair | Candidates:
    human = value.get("human")
    if "responses" in value:
        prompt = _prompt(value.get("prompt", ""))
        responses = value["responses"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise ValueError('"responses" must be a list of two or more texts')
    else:
        missing = [k for k in ("chosen", "rejected") if k not in value]
        if missing:
            raise ValueError('no "responses"; expected {"prompt": […], "responses": [text, text]}')
        prompt, chosen, rejected = _sides(value)
        responses = [chosen[-1].content, rejected[-1].content]
        if value.get("labeler", "human") == "human" and not value.get("abstained"):
            human = value.get("label", 1.0)
    kind = Pair if len(responses) == 2 else Candidates
    return kind.model_validate(
        {
            **value,
            "id": value.get("id") or _id([prompt, responses]),
            "prompt": prompt,
            "responses": responses,
            "human": human,
        }
    )


def read_records(name: str, one: Callable[[dict[str, Any]], T]) -> list[T]:
    """Records of any kind that has an id, each made by `one`, whose ValueErrors are told with file and line."""
    return _unique(_read(name, one), name)


def _read(name: str, one: Callable[[dict[str, Any]], T]) -> list[T]:
    out = []
    for place, value in read_jsonl(name):
        with _told(place):
            out.append(one(value))
    if not out:
        raise InputError(f"{name}: the file is empty; one JSON object a line")
    return out


@contextmanager
def _told(place: str) -> Iterator[None]:
    """What is wrong with a record becomes one line that says where."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise InputError(f"{place}: {where + ': ' if where else ''}{first['msg']}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{place}: {error}") from error


def _unique(records: list[T], name: str) -> list[T]:
    """The same id twice would make a journal take one record for the other."""
    seen: set[str] = set()
    for record in records:
        key: str = record.id  # type: ignore[attr-defined]
        if key in seen:
            raise InputError(f'{name}: the id "{key}" (or the very same record) stands twice; make ids unique')
        seen.add(key)
    return records


def _id(value: Any) -> str:
    return fingerprint("record", json.loads(json.dumps(value, default=lambda m: m.model_dump())))


def _chat(value: Any) -> Chat:
    return parse_transcript(value) if isinstance(value, str) else tuple(Message.model_validate(m) for m in value)


def _prompt(value: Any) -> Chat:
    return Prompt.model_validate({"prompt": value}).prompt


def _answer(value: Any) -> Chat:
    return (assistant(value),) if isinstance(value, str) else tuple(Message.model_validate(m) for m in value)


def _without_answer(chat: Chat) -> Chat:
    return chat[:-1] if chat and chat[-1].role == "assistant" else chat


def _sides(value: dict[str, Any]) -> tuple[Chat, Chat, Chat]:
    """prompt, chosen answer, rejected answer."""
    if "prompt" in value:
        return _prompt(value["prompt"]), _answer(value["chosen"])[-1:], _answer(value["rejected"])[-1:]
    chosen, rejected = _chat(value["chosen"]), _chat(value["rejected"])
    if not chosen or not rejected or chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise ValueError("both transcripts must end with the assistant's turn")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected do not share their prompt")
    return _prompt(chosen[:-1]), chosen[-1:], rejected[-1:]
