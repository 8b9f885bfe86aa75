"""Every record that is written can be read again, and is then the same."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solon import records
from solon.analysis.measures import Answer
from solon.records import Chat, Message, Record

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SHARE = st.floats(0, 1)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
MESSAGES = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXT)
ASKED: st.SearchStrategy[Chat] = st.lists(MESSAGES, max_size=2).map(lambda m: (*m, records.user("why?")))
KINDS = sorted(
    {kind for kind in [*vars(records).values(), Answer] if isinstance(kind, type) and issubclass(kind, Record)}
    - {Record},
    key=lambda kind: kind.__name__,
)


def of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Record):
        return some(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(of, inner))
    if origin is tuple:
        return st.lists(of(inner[0]), max_size=2).map(tuple) if inner[-1] is ... else st.tuples(*map(of, inner))
    if origin is dict:
        return st.dictionaries(TEXT, JSON if inner[1] is Any else of(inner[1]), max_size=2)
    if origin is typing.Literal:
        return st.sampled_from(inner)
    return {str: TEXT, float: SHARE, int: st.integers(), bool: st.booleans(), type(None): st.none(), Any: JSON}[kind]


def some(kind: type[Record]) -> st.SearchStrategy[Any]:
    """Any record of the kind, None wherever a field may be."""
    special: dict[str, st.SearchStrategy[Any]] = {"prompt": ASKED, "watched": st.just({"words": None})}
    if kind is records.Candidates:
        special["responses"] = st.lists(TEXT, min_size=2, max_size=3).map(tuple)
    if kind is records.SFTExample:  # a turn that is learned must be the assistant's
        special["messages"] = st.tuples(MESSAGES, TEXT.map(records.assistant))
        special["train_turns"] = st.none() | st.just((1,))
    fields = typing.get_type_hints(kind)
    return st.builds(kind, **{name: special.get(name, of(fields[name])) for name in kind.model_fields})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_record_that_is_written_is_read_as_the_same(kind: type[Record]) -> None:
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(some(kind))
    def law(record: Record) -> None:
        line = json.dumps(record.to_json(), ensure_ascii=False).encode()
        assert kind.model_validate(json.loads(line)) == record

    law()


def test_an_abstention_of_an_older_solon_is_read() -> None:
    found = records.Judgement.model_validate({"principle": "harmless", "abstained": "refused"})
    assert found.forward is None and found.swapped is None and found.to_json()["forward"] is None
