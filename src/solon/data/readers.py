"""Readers of the field's formats: Solon's own, TRL conversational and preference, HH transcripts, ShareGPT, RewardBench,
UltraFeedback, plain JSONL.

Every wrong record is named by file and line, with what was expected. A record that stands twice is taken once, and said;
two records of one id that differ are refused, both lines named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from solon.constitution import load_constitution
from solon.data.conversations import (
    completions_of,
    conversation,
    last_answers,
    normalised,
    parse_transcript,
    prompt_of,
    without_answer,
)
from solon.data.lines import empty, first_line, read_jsonl
from solon.data.shipped import SHIPPED
from solon.errors import InputError, printable
from solon.records import Candidates, Chat, Comparison, Pair, Prompt, RevisionChain, SFTExample, fingerprint
from solon.terminal import note

__all__ = [
    "first_line",
    "parse_transcript",
    "read_comparisons",
    "read_demonstrations",
    "read_jsonl",
    "read_pairs",
    "read_prompts",
    "read_records",
    "read_revision_chains",
    "stream_pairs",
]
T = TypeVar("T")
Row = dict[str, Any]


def read_prompts(name: str) -> list[Prompt]:
    """Prompts: Solon's form, `{"prompt": "text"}`, an HH transcript, or a conversation (TRL `messages`, ShareGPT, the
    `chosen` of a preference row) up to the last user turn."""

    def one(value: Row) -> Prompt:
        if "prompt" in value or "instruction" in value:
            prompt = prompt_of(value)
        elif "chosen" in value:
            prompt = without_answer(conversation(value["chosen"], "chosen"))
        else:
            prompt = _messages(
                value, 'no "prompt"; expected {"prompt": "text"} or {"prompt": [{"role", "content"}, …]}'
            )
            while prompt and prompt[-1].role == "assistant":
                prompt = prompt[:-1]
        return Prompt.model_validate({**value, "prompt": prompt})

    return _records(name, one)


def read_demonstrations(name: str) -> list[SFTExample]:
    """Demonstrations: a conversation (TRL `messages`, ShareGPT), `{"prompt", "completion"}`, `{"instruction", "output"}`,
    or an HH transcript in `text` or `chosen`."""

    def one(value: Row) -> SFTExample:
        answer = next((key for key in ("completion", "output") if key in value), None)
        if "messages" not in value and answer and ("prompt" in value or "instruction" in value):
            messages = (*prompt_of(value), *conversation(value[answer], answer, plain="assistant"))
        elif "messages" not in value and ("text" in value or "chosen" in value):
            side = "text" if "text" in value else "chosen"
            messages = conversation(value[side], side)
        else:
            messages = _messages(value, 'no "messages"; expected {"messages": [{"role", "content"}, …]}')
        example = SFTExample.model_validate({**value, "id": value.get("id") or _id(messages), "messages": messages})
        if not any(m.role == "assistant" and m.content.strip() for m in example.messages):
            raise ValueError("no assistant turn to learn from")
        return example

    return _records(name, one)


def read_revision_chains(name: str) -> list[RevisionChain]:
    """Revision chains in Solon's form."""

    def one(value: Row) -> RevisionChain:
        prompt = prompt_of(value)
        chain = RevisionChain.model_validate({**value, "id": value.get("id") or _id(prompt), "prompt": prompt})
        if not chain.steps:
            raise ValueError('"steps" is empty; expected [{"principle", "critique", "revision"}, …]')
        return chain

    return _records(name, one)


def read_comparisons(name: str) -> list[Comparison]:
    """Comparisons: TRL preference (with or without Solon's `label`), UltraFeedback (binarised), RewardBench 1 and 2, HH
    `chosen`/`rejected` transcripts.

    Without a `label` the choice is taken as certain; without a `labeler` as a person's. Those that ship with Solon were
    made under the constitution `solon`, and say so in `meta`.
    """
    made_under = {"constitution": load_constitution("solon").fingerprint} if name in SHIPPED else {}

    def one(value: Row) -> list[Comparison]:
        sides = last_answers(value, 'expected {"prompt", "chosen", "rejected"}')
        abstained = value.get("abstained", False)
        label = value.get("label", None if abstained else 1.0)
        if label is None and not abstained:
            raise ValueError('"label" is null, and "abstained" is not true; give P(chosen is better), 0 to 1')
        meta = value.get("meta")
        if meta is None or isinstance(meta, dict):  # another kind is refused with the record
            meta = {**made_under, **(meta or {})}
        return [
            Comparison.model_validate(
                {
                    "labeler": "human",
                    **value,
                    "id": _named(value, [s.prompt, s.chosen, s.rejected], s.place),
                    "prompt": s.prompt,
                    "chosen": s.chosen,
                    "rejected": s.rejected,
                    "label": label,
                    "meta": meta,
                }
            )
            for s in sides
        ]

    return _records(name, one)


def read_pairs(name: str) -> list[Pair]:
    """Pairs to compare: `{"prompt", "responses": [a, b]}`, TRL preference, HH transcripts and the other preference forms.

    What a person chose stays known as `human`, to measure a judge against; no judge sees it.
    """

    def one(value: Row) -> Pair:
        made = _candidates(value)
        if isinstance(made, Candidates):
            raise ValueError('"responses" must be a list of two texts')
        return made

    return _records(name, one)


class PairStream:
    """The pairs of a file one at a time, in memory that grows by an id and a digest a record.

    May be read again and again. repeated: how many records the last reading met again and passed over.
    """

    def __init__(self, name: str) -> None:
        self.name, self.repeated = name, 0

    def __iter__(self) -> Iterator[Pair | Candidates]:
        seen = _Seen()
        for place, value in read_jsonl(self.name):
            with _told(place):
                made = _candidates(normalised(value))
            new = seen.distinct(made, place, named=_has_id(value))
            self.repeated = seen.repeated
            if new is not None:
                yield new
        if not seen.by_id:
            raise empty(self.name)


def stream_pairs(name: str) -> PairStream:
    """As `read_pairs`, one at a time and in flat memory; more than two responses to a prompt are Candidates."""
    return PairStream(name)


def read_records(name: str, one: Callable[[Row], T]) -> list[T]:
    """Records of any kind that has an id, each made by `one`, whose ValueErrors are told with file and line."""
    return _records(name, one)


def _candidates(value: Row) -> Pair | Candidates:
    human, authors = value.get("human"), value.get("authors")
    if "responses" in value:
        prompt, responses = prompt_of(value), value["responses"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise ValueError('"responses" must be a list of two or more texts')
    elif "completions" in value:
        prompt = prompt_of(value)
        responses, authors = completions_of(value)
    else:
        sides = last_answers(value, 'no "responses"; expected {"prompt": […], "responses": [text, text]}')
        prompt = sides[0].prompt
        better = dict.fromkeys(s.chosen[-1].content for s in sides)
        worse = dict.fromkeys(s.rejected[-1].content for s in sides)
        responses = (
            [*better, *worse] if len(sides) > 1 else [sides[0].chosen[-1].content, sides[0].rejected[-1].content]
        )
        if value.get("labeler", "human") == "human" and not value.get("abstained"):
            human = value.get("label", 1.0)
    kind = Pair if len(responses) == 2 else Candidates
    made = {"prompt": prompt, "responses": responses, "human": human, "authors": authors}
    return kind.model_validate({**value, **made, "id": _named(value, [prompt, responses])})


def _messages(value: Row, expected: str) -> Chat:
    for key in ("messages", "conversations", "conversation"):
        if key in value:
            return conversation(value[key], key, system=value.get("system"))
    raise ValueError(expected)


def _records(name: str, one: Callable[[Row], T | list[T]]) -> list[T]:
    """Every record of a file, identical ones once. Raises InputError for the first that is wrong, or for no record."""
    seen, out = _Seen(), []
    for place, value in read_jsonl(name):
        with _told(place):
            made = one(normalised(value))
        for record in made if isinstance(made, list) else [made]:
            if (new := seen.distinct(record, place, named=_has_id(value))) is not None:
                out.append(new)
    if not out:
        raise empty(name)
    if seen.repeated:
        note(f"{name}: {seen.repeated} of its records stand there more than once and are taken once")
    return out


class _Seen:
    """The records met so far, by id: the same id twice would make a journal take one record for the other."""

    def __init__(self) -> None:
        self.by_id: dict[str, tuple[bytes, str]] = {}  # id: digest of the record without its id, place
        self.repeated = 0

    def distinct(self, record: Any, place: str, *, named: bool) -> Any:
        """The record, or None where the very same one was met. named: the file gave the id.

        Two records that differ and have the same derived id (labels of two people for one pair) get ids of their own.
        """
        digest = hashlib.blake2b(_canonical(record.model_dump(mode="json", exclude={"id"})), digest_size=16).digest()
        name, n = record.id, 1
        while name in self.by_id:
            known, first = self.by_id[name]
            if known == digest:
                self.repeated += 1
                return None
            if named:
                raise InputError(
                    f'{place}: the id "{printable(name, 80)}" stands twice, first on another record at {first}; '
                    "make ids unique"
                )
            n += 1
            name = f"{record.id}-{n}"
        self.by_id[name] = (digest, place)
        return record if n == 1 else record.model_copy(update={"id": name})


@contextmanager
def _told(place: str) -> Iterator[None]:
    """What is wrong with a record becomes one line that says where."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(str(x) for x in first["loc"]), 80)
        message = printable(first["msg"].removeprefix("Value error, "))
        raise InputError(f"{place}: {where}: {message}" if where else f"{place}: {message}") from error
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise InputError(f"{place}: {printable(str(error))}") from error


def _has_id(value: Row) -> bool:
    return value.get("id") not in (None, "")


def _named(value: Row, content: Sequence[Any], place: str = "") -> str:
    """The record's id, or one derived from its content; `place` tells the pairs of one record apart."""
    return f"{value['id']}{place}" if value.get("id") else _id(content)


def _id(value: Any) -> str:
    return fingerprint("record", json.loads(json.dumps(value, default=lambda m: m.model_dump())))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
