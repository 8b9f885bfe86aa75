"""Readers of the field's formats: Solon's own, TRL conversational and preference, HH transcripts, ShareGPT, RewardBench,
UltraFeedback, plain JSONL.

The error for a wrong record names file, line and the expected form. A record that stands twice is taken once, and a note
says so. Two different records with one id are refused; the error names both lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from solon.constitution import load_constitution
from solon.data.conversations import completions_of, conversation, last_answers, normalised, prompt_of, without_answer
from solon.data.lines import SHIPPED, empty, read_jsonl
from solon.data.lines import first_line as first_line
from solon.errors import InputError, printable
from solon.records import Candidates, Chat, Comparison, Pair, Prompt, RevisionChain, SFTExample, fingerprint
from solon.terminal import note

T = TypeVar("T")
Row = dict[str, Any]
CONVERSATIONS = ("messages", "conversations", "conversation")  # keys of a row that hold a whole conversation


def read_prompts(name: str) -> list[Prompt]:
    """Prompts: Solon's form, `{"prompt": "text"}`, an HH transcript, or a conversation (TRL `messages`, ShareGPT, the
    `chosen` of a preference row) up to the last user turn."""

    def parse(value: Row) -> Prompt:
        if "prompt" in value or "instruction" in value:
            prompt = prompt_of(value)
        elif "chosen" in value:
            prompt = without_answer(conversation(value["chosen"], "chosen", system=value.get("system")))
        else:
            prompt = _messages(
                value, 'no "prompt"; expected {"prompt": "text"} or {"prompt": [{"role", "content"}, …]}'
            )
            while prompt and prompt[-1].role == "assistant":
                prompt = prompt[:-1]
        return Prompt.model_validate({**value, "prompt": prompt})

    return read_records(name, parse)


def read_demonstrations(name: str) -> list[SFTExample]:
    """Demonstrations: a conversation (TRL `messages`, ShareGPT), `{"prompt", "completion"}`, `{"instruction", "output"}`,
    or an HH transcript in `text` or `chosen`."""

    def parse(value: Row) -> SFTExample:
        answer = next((key for key in ("completion", "output") if key in value), None)
        if "messages" not in value and answer and ("prompt" in value or "instruction" in value):
            messages = (*prompt_of(value), *conversation(value[answer], answer, plain="assistant"))
        elif "messages" not in value and ("text" in value or "chosen" in value):
            side = "text" if "text" in value else "chosen"
            messages = conversation(value[side], side, system=value.get("system"))
        else:
            messages = _messages(value, 'no "messages"; expected {"messages": [{"role", "content"}, …]}')
            value = _turns_after_system(value, messages)
        example = SFTExample.model_validate({**value, "id": value.get("id") or _id(messages), "messages": messages})
        if not any(m.role == "assistant" and m.content.strip() for m in example.messages):
            raise ValueError("no assistant turn to learn from")
        return example

    return read_records(name, parse)


def read_revision_chains(name: str) -> list[RevisionChain]:
    """Revision chains in Solon's form."""

    def parse(value: Row) -> RevisionChain:
        prompt = prompt_of(value)
        chain = RevisionChain.model_validate({**value, "id": value.get("id") or _id(prompt), "prompt": prompt})
        if not chain.steps:
            raise ValueError('"steps" is empty; expected [{"principle", "critique", "revision"}, …]')
        return chain

    return read_records(name, parse)


def read_comparisons(name: str) -> list[Comparison]:
    """Comparisons: TRL preference (with or without Solon's `label`), UltraFeedback (binarised), RewardBench 1 and 2, HH
    `chosen`/`rejected` transcripts.

    Without a `label` the choice counts as certain; without a `labeler` it counts as a person's. `meta` of the comparisons
    that ship with Solon names the constitution `solon`, under which they were made.
    """
    shipped_meta = {"constitution": load_constitution("solon").fingerprint} if name in SHIPPED else {}

    def parse(value: Row) -> list[Comparison]:
        sides = last_answers(value, 'expected {"prompt", "chosen", "rejected"}')
        abstained = value.get("abstained", False)
        label = value.get("label", None if abstained else 1.0)
        if label is None and not abstained:
            raise ValueError('"label" is null, and "abstained" is not true; give P(chosen is better), 0 to 1')
        meta = value.get("meta")
        if meta is None or isinstance(meta, dict):  # the record's own check refuses any other kind
            meta = {**shipped_meta, **(meta or {})}
        fields = {"labeler": "human", **value, "label": label, "meta": meta}
        return [
            Comparison.model_validate(
                {
                    **fields, "id": _named(value, [s.prompt, s.chosen, s.rejected], s.suffix),
                    "prompt": s.prompt, "chosen": s.chosen, "rejected": s.rejected,
                }
            )
            for s in sides
        ]  # fmt: skip

    return read_records(name, parse)


def read_pairs(name: str) -> list[Pair]:
    """Pairs to compare: `{"prompt", "responses": [a, b]}`, TRL preference, HH transcripts and the other preference forms.

    `human` keeps a person's choice, to measure a judge against; no judge sees it.
    """

    def parse(value: Row) -> Pair:
        pair = _candidates(value)
        if isinstance(pair, Candidates):
            raise ValueError('"responses" must be a list of two texts')
        return pair

    return read_records(name, parse)


class PairStream:
    """The pairs of a file one at a time, in memory that grows by an id and a digest per record.

    It can be iterated again and again. repeated: how many repeated records the last iteration skipped.
    """

    def __init__(self, name: str) -> None:
        self.name, self.repeated = name, 0

    def __iter__(self) -> Iterator[Pair | Candidates]:
        seen = _Seen()
        for place, value in read_jsonl(self.name):
            with _errors_at(place):
                candidates = _candidates(normalised(value))
            new = seen.distinct(candidates, place, named=_has_id(value))
            self.repeated = seen.repeated
            if new is not None:
                yield new
        if not seen.by_id:
            raise empty(self.name)


def stream_pairs(name: str) -> PairStream:
    """As `read_pairs`, one at a time and in flat memory; more than two responses to a prompt are Candidates."""
    return PairStream(name)


def read_records(name: str, parse: Callable[[Row], T | list[T]]) -> list[T]:
    """Every record of a file, identical ones once. parse: makes one or more records, which have an id, from a row.

    Raises InputError with file and line for the first row that `parse` refuses with a ValueError, and for an empty file.
    """
    seen, out = _Seen(), []
    for place, value in read_jsonl(name):
        with _errors_at(place):
            parsed = parse(normalised(value))
        for record in parsed if isinstance(parsed, list) else [parsed]:
            if (new := seen.distinct(record, place, named=_has_id(value))) is not None:
                out.append(new)
    if not out:
        raise empty(name)
    if seen.repeated:
        note(f"{name}: {seen.repeated} of its records stand there more than once and are taken once")
    return out


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
        # equal responses of one comparison stay two
        one = sides[0]
        responses = [*better, *worse] if len(sides) > 1 else [one.chosen[-1].content, one.rejected[-1].content]
        if value.get("labeler", "human") == "human" and not value.get("abstained"):
            human = value.get("label", 1.0)
    kind = Pair if len(responses) == 2 else Candidates
    fields = {"prompt": prompt, "responses": responses, "human": human, "authors": authors}
    return kind.model_validate({**value, **fields, "id": _named(value, [prompt, responses])})


def _messages(value: Row, expected: str) -> Chat:
    for key in CONVERSATIONS:
        if key in value:
            return conversation(value[key], key, system=value.get("system"))
    raise ValueError(expected)


def _turns_after_system(value: Row, messages: Chat) -> Row:
    """The row with `train_turns` counted in `messages`, which begin with the row's `system` field where it was put first."""
    given = next(value[key] for key in CONVERSATIONS if key in value)
    turns, added = value.get("train_turns"), len(messages) - len(given)
    if not isinstance(given, list) or not isinstance(turns, list) or added != 1:
        return value
    return {**value, "train_turns": [t + 1 if type(t) is int and t >= 0 else t for t in turns]}


class _Seen:
    """The records read so far, by id: with one id twice, a journal would take one record for the other."""

    def __init__(self) -> None:
        self.by_id: dict[str, tuple[bytes, str]] = {}  # id: digest of the record without its id, place
        self.repeated = 0

    def distinct(self, record: Any, place: str, *, named: bool) -> Any:
        """The record, or None where an equal record was read before. named: the file gave the id.

        Two different records with the same derived id (two people's labels for one pair) get different ids.
        """
        content = json.dumps(record.model_dump(mode="json", exclude={"id"}), sort_keys=True, default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
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
def _errors_at(place: str) -> Iterator[None]:
    """Turn the error of a wrong record into an InputError of one line that begins with the place."""
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


def _named(value: Row, content: Sequence[Any], suffix: str = "") -> str:
    """The record's id with the suffix, or an id derived from its content."""
    return f"{value['id']}{suffix}" if value.get("id") else _id(content)


def _id(value: Any) -> str:
    return fingerprint("record", json.loads(json.dumps(value, default=lambda m: m.model_dump())))
