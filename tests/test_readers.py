"""Readers: the field's formats are read as they are; a wrong line is named; what ships is what it says."""

from __future__ import annotations

import gzip
import json
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solon.constitution import load_constitution
from solon.data import read_comparisons, read_demonstrations, read_pairs, read_prompts, read_revision_chains
from solon.data.conversations import parse_transcript
from solon.data.lines import read_jsonl
from solon.data.readers import stream_pairs
from solon.errors import InputError
from solon.measures.texts import tokens, words
from solon.records import text_of

HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: more\n\nAssistant: "


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_prompts_in_every_form_mean_the_same(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    forms = [
        {"prompt": turns},
        {"messages": [*turns, {"role": "assistant", "content": "answer"}]},
        {"chosen": HH + "good", "rejected": HH + "bad"},
        {"prompt": HH.rsplit("\n\n", 1)[0]},
    ]
    read = [read_prompts(write(tmp_path / f"{i}.jsonl", form))[0] for i, form in enumerate(forms)]
    assert len({p.prompt for p in read}) == 1 and len({p.id for p in read}) == 1
    assert read_prompts(write(tmp_path / "plain.jsonl", {"prompt": "hi"}))[0].prompt[0].content == "hi"


def test_comparisons_in_every_form_mean_the_same(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    forms = [
        {"chosen": HH + "good", "rejected": HH + "bad"},
        {"prompt": turns, "chosen": "good", "rejected": "bad"},
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
    ]
    read = [read_comparisons(write(tmp_path / f"{i}.jsonl", form))[0] for i, form in enumerate(forms)]
    assert len({(c.prompt, c.chosen, c.rejected, c.label, c.labeler) for c in read}) == 1
    assert read[0].label == 1.0 and read[0].labeler == "human"
    pairs = [read_pairs(str(tmp_path / f"{i}.jsonl"))[0] for i in range(3)]
    assert {p.responses for p in pairs} == {("good", "bad")}


def test_our_own_comparisons_come_back_as_they_went(tmp_path: Path) -> None:
    [c] = read_comparisons(
        write(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b", "label": 0.7, "labeler": "ai"})
    )
    assert read_comparisons(write(tmp_path / "b.jsonl", c.to_json())) == [c]
    silent = c.model_copy(update={"label": None, "abstained": True})
    assert read_comparisons(write(tmp_path / "c.jsonl", silent.to_json())) == [silent]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "hi"}\n\n{"prompt": "ho"}\n'))
    assert len(read_prompts(str(path))) == 2


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"prompt": "a"}', "{oops"], ":2: not JSON"),
        (["[1]"], ":1: a list; expected a JSON object"),
        (['{"text": "a"}'], ':1: no "prompt"'),
        (['{"prompt": ""}'], ":1: .*empty"),
        (['{"prompt": [{"role": "assistant", "content": "x"}]}'], ":1: .*end with a user turn"),
        (['{"prompt": [{"role": "robot", "content": "x"}]}'], ":1: prompt.*role"),
        (['{"id": "x", "prompt": "a"}', '{"id": "x", "prompt": "b"}'], ":2: .*stands twice.*:1"),
        ([], "is empty"),
    ],
)
def test_a_wrong_line_is_named(lines: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_prompts(write(tmp_path / "bad.jsonl", *lines))
    assert "\n" not in str(error.value)


# A line of each kind of fault, and what every reader that meets it says. The second line of the file is the wrong one.
BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"prompt": "q", "chosen": "a", "rejected": "b", "label": NaN}', "NaN is not a number of JSON"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b", "label": Infinity}', "Infinity is not"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b", "label": 1e999}', "too large"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b", "label": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "x \\ud800 y"}', "half of a surrogate pair"),
    (b'{"prompt": "x", "\\udc00": 1}', "half of a surrogate pair"),
    (b'{"prompt": "x", "meta": {"a": [' + b"[" * 100 + b"]" * 100 + b"]}}", "nested more than 64 deep"),
    (b'{"prompt": "x", "meta": ' + b"[" * 100_000, "nested more than 64 deep"),
    (b'{"prompt": "a", "prompt": "b"}', 'the key "prompt" stands twice'),
    (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', "longer than 4 MiB"),
    ('{"prompt": "hi"}'.encode("utf-16-le"), "NUL bytes, as UTF-16"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "a\x1b[2J', "not JSON"),
    (b'"text"', "a str; expected a JSON object"),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES)
@pytest.mark.parametrize("read", [read_prompts, read_comparisons, read_pairs, lambda name: list(stream_pairs(name))])
def test_no_line_is_a_traceback(line: bytes, says: str, read: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "fine", "chosen": "a", "rejected": "b"}\n' + line + b"\n")
    with pytest.raises(InputError, match=says) as error:
        read(str(path))
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % n for n in range(5000)))
    files = {
        "cut.jsonl.gz": (whole[:-200], "damaged or cut off"),
        "not.jsonl.gz": (b'{"prompt": "hi"}', "not gzip-compressed"),
        "hurt.jsonl.gz": (whole[:2000] + b"\0\0\0\0" + whole[2004:], "damaged"),
        "utf16.jsonl": ('{"prompt": "hi"}'.encode("utf-16"), "not UTF-8"),
        "empty.jsonl": (b"", "is empty"),
        "blank.jsonl": (b"\n \r\n\t\n", "is empty"),
    }
    for name, (data, says) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=says) as error:
            read_prompts(str(tmp_path / name))
        assert name in str(error.value)
    for name, says in ((str(tmp_path), "a folder"), ("", "name of a file is empty"), ("a\0b", "cannot be read"),
                       (str(tmp_path / "none.jsonl"), "no such file"), ("/dev/zero", "pipe or device")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            read_prompts(name)


def test_what_a_file_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solon.data.lines.BOMB_BYTES", 1 << 20)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((b" " * 1023 + b"\n") * (8 << 10)))
    (tmp_path / "line.jsonl.gz").write_bytes(gzip.compress(b" " * (64 << 20)))
    for name, says in (("lines", "-fold when unpacked"), ("line", "longer than 4 MiB")):
        tracemalloc.start()
        with pytest.raises(InputError, match=says):
            read_prompts(str(tmp_path / f"{name}.jsonl.gz"))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()


def test_a_byte_order_mark_and_dos_line_ends_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [p.prompt[0].content for p in read_prompts(str(path))] == ["a", "b"]


@pytest.mark.parametrize("label", [2, -0.1, 8.5, "0.7", True, [], {}, None])
def test_a_label_is_a_probability(label: Any, tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": label}
    with pytest.raises(InputError, match=r":1: .*label"):
        read_comparisons(write(tmp_path / "c.jsonl", row))
    for name in ("forward", "swapped"):
        judged = {"principle": "p", "forward": 0.5, "swapped": 0.5, name: label}
        if label is not None:
            with pytest.raises(InputError, match=f":1: judgements.0.{name}"):
                read_comparisons(write(tmp_path / "c.jsonl", {**row, "label": 0.5, "judgements": [judged]}))
    if label is not None:
        with pytest.raises(InputError, match=":1: human"):
            read_pairs(write(tmp_path / "p.jsonl", {"prompt": "q", "responses": ["a", "b"], "human": label}))


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4), st.text(), st.text(), st.booleans())
def test_a_preference_row_keeps_every_turn(said: list[str], good: str, bad: str, system: bool) -> None:
    """However the row divides the conversation between prompt and sides, the prompt is all of it but the last answer."""
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for n, text in enumerate(said):
        turns += [{"role": "user", "content": text}] + [{"role": "assistant", "content": f"a{n}"}] * (n < len(said) - 1)
    ends = {"chosen": [{"role": "assistant", "content": good}], "rejected": [{"role": "assistant", "content": bad}]}
    forms = [{side: turns + end for side, end in ends.items()}]
    for cut in range(1 + system, len(turns) + 1):  # the prompt ends with a user's turn
        if turns[cut - 1]["role"] == "user":
            forms.append({"prompt": turns[:cut], **{side: turns[cut:] + end for side, end in ends.items()}})
            forms.append({"prompt": turns[:cut], **{side: turns + end for side, end in ends.items()}})
    if not system and not said[0].lstrip().startswith(("Human:", "Assistant:")):
        forms.append({"prompt": said[0], **{side: turns + end for side, end in ends.items()}})
    with tempfile.TemporaryDirectory() as folder:
        read = [read_comparisons(write(Path(folder) / "c.jsonl", form))[0] for form in forms]
        pairs = [read_pairs(write(Path(folder) / "c.jsonl", form))[0] for form in forms]
    for c, p in zip(read, pairs, strict=True):
        assert [m.model_dump() for m in c.prompt] == turns and c.prompt == p.prompt
        assert text_of(c.chosen) == good and text_of(c.rejected) == bad and p.responses == (good, bad)


def test_what_a_user_said_is_never_judged(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    for chosen, says in (
        ([answer, user], 'chosen" must end with the assistant'),
        ([user], 'chosen" must end with the assistant'),
        ([], 'chosen" is an empty list'),
        (None, 'chosen" is null'),
        (3, "is a number"),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], "a tool call without text"),
        ([{"role": "assistant", "content": None}], "content is null"),
        ([{"role": "assistant", "content": 3}], "content is a number"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is not read"),
        ([{"content": "x"}], 'no "role"'),
        (["x", 3], "expected a message"),
        ([{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}], "is no text"),
        ([{"role": "user", "content": "other"}, answer], "but not with the prompt"),
        ([answer, user, answer], "do not share their prompt"),
    ):
        row = {"prompt": "q", "chosen": chosen, "rejected": [answer]}
        for read in (read_comparisons, read_pairs, lambda name: list(stream_pairs(name))):
            with pytest.raises(InputError, match=f":1: .*{says}"):
                read(write(tmp_path / "c.jsonl", row))


def test_the_forms_of_well_known_sets_are_read(tmp_path: Path) -> None:
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "id": 30, "subset": "alpacaeval-easy",
         "chosen_model": "GPT4-Turbo", "rejected_model": "alpaca-7b"},  # RewardBench
        {"prompt": "q", "prompt_id": "f0e3", "chosen": [user, good], "rejected": [user, bad],
         "messages": [user, good], "score_chosen": 6.0, "score_rejected": 4.0},  # UltraFeedback, binarised
        {"source": "sharegpt", "prompt": [user], "chosen": good, "rejected": bad},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},  # ShareGPT preference
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "chosen": [good], "rejected": [bad]},
    ]  # fmt: skip
    for row in rows:
        name = write(tmp_path / "x.jsonl", row)
        [c], [p] = read_comparisons(name), read_pairs(name)
        assert [m.content for m in (*c.prompt, *c.chosen, *c.rejected)] == ["q", "a", "b"] and c.label == 1.0
        assert p.responses == ("a", "b") and p.human == 1.0 and p.prompt == c.prompt
    assert read_comparisons(write(tmp_path / "x.jsonl", rows[0]))[0].authors == ("GPT4-Turbo", "alpaca-7b")
    assert read_comparisons(write(tmp_path / "x.jsonl", rows[0]))[0].id == "30"
    assert read_comparisons(write(tmp_path / "x.jsonl", rows[1]))[0].meta["score_chosen"] == 6.0
    assert read_comparisons(write(tmp_path / "x.jsonl", rows[2]))[0].meta["source"] == "sharegpt"
    second = {"id": "7", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}  # RewardBench 2
    name = write(tmp_path / "x.jsonl", second)
    assert [(c.id, text_of(c.rejected)) for c in read_comparisons(name)] == [
        ("7/0-0", "b"),
        ("7/0-1", "c"),
        ("7/0-2", "d"),
    ]
    [many] = stream_pairs(name)
    assert many.responses == ("a", "b", "c", "d")
    rated = {"source": "evol_instruct", "instruction": "q", "completions": [
        {"model": "m", "response": "a", "overall_score": 8}, {"model": "n", "response": "b"}]}  # UltraFeedback  # fmt: skip
    [pair] = stream_pairs(write(tmp_path / "x.jsonl", rated))
    assert pair.responses == ("a", "b") and pair.authors == ("m", "n")
    chat = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for row in ({"conversations": chat}, {"system": "s", "messages": [user, good]}):
        [d] = read_demonstrations(write(tmp_path / "x.jsonl", row))
        assert [(m.role, m.content) for m in d.messages] == [("system", "s"), ("user", "q"), ("assistant", "a")]
        assert read_prompts(write(tmp_path / "x.jsonl", row))[0].prompt == d.messages[:2]
    [d] = read_demonstrations(write(tmp_path / "x.jsonl", {"instruction": "q", "input": "x", "output": "a"}))
    assert [m.content for m in d.messages] == ["q\n\nx", "a"]


def test_the_system_message_of_a_record_comes_first(tmp_path: Path) -> None:
    """In every form of record. A conversation that has a system message keeps it, at its position."""
    q, a, b, s = (
        {"role": role, "content": text}
        for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"), ("system", "s"))
    )
    transcript = "\n\nHuman: q\n\nAssistant: "
    demonstrations: list[dict[str, Any]] = [
        {"system": "s", "messages": [q, a]},
        {"system": "other", "messages": [s, q, a]},  # the conversation's own counts
        {"system": "s", "prompt": "q", "completion": "a"},
        {"system": "s", "instruction": "q", "output": "a"},
        {"system": "s", "text": transcript + "a"},
    ]
    preferences: list[dict[str, Any]] = [
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"},
        {"system": "s", "prompt": "q", "chosen": [q, a], "rejected": [q, b]},
        {"system": "s", "prompt": [q], "chosen": [q, a], "rejected": [q, b]},
        {"prompt": [s, q], "chosen": [q, a], "rejected": [q, b]},
        {"system": "s", "instruction": "q", "chosen": "a", "rejected": "b"},
        {"system": "s", "chosen": transcript + "a", "rejected": transcript + "b"},
        {"system": "s", "chosen": [q, a], "rejected": [q, b]},
        {"system": "s", "conversations": [q], "chosen": a, "rejected": b},
    ]
    name = str(tmp_path / "x.jsonl")
    for row in demonstrations:
        [d] = read_demonstrations(write(tmp_path / "x.jsonl", row))
        assert [m.model_dump() for m in d.messages] == [s, q, a]
        if "text" not in row:
            assert read_prompts(name)[0].prompt == d.messages[:2]
    for row in preferences:
        [c], [p] = read_comparisons(write(tmp_path / "x.jsonl", row)), read_pairs(name)
        assert [m.model_dump() for m in c.prompt] == [s, q] and p.prompt == c.prompt
        assert p.responses == ("a", "b") == (text_of(c.chosen), text_of(c.rejected))
    for row in ({"system": "s", "prompt": "q"}, preferences[5], preferences[6]):
        assert [m.model_dump() for m in read_prompts(write(tmp_path / "x.jsonl", row))[0].prompt] == [s, q]
    [d] = read_demonstrations(write(tmp_path / "x.jsonl", {"system": "other", "messages": [q, a, s, q, b]}))
    assert [m.model_dump() for m in d.messages] == [q, a, s, q, b]


def test_turns_to_learn_are_those_of_the_row_where_a_system_field_is_put_first(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")],
        "train_turns": [1],
    }
    for system, turn in (({}, 1), ({"system": "s"}, 2)):
        [d] = read_demonstrations(write(tmp_path / "x.jsonl", {**row, **system}))
        assert d.train_turns == (turn,) and d.messages[turn] == d.messages[-3]


def test_identical_records_are_taken_once_and_different_ones_never_lost(tmp_path: Path, capsys: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": 0.7}
    name = write(tmp_path / "c.jsonl", row, row, {**row, "label": 0.2}, row)
    assert [c.label for c in read_comparisons(name)] == [0.7, 0.2]
    assert "2 of its records stand there more than once" in capsys.readouterr().err
    assert len({c.id for c in read_comparisons(name)}) == 2
    stream = stream_pairs(name)
    assert len(list(stream)) == len(list(stream)) == len(read_pairs(name)) and stream.repeated == 2
    for read in (read_comparisons, read_pairs, lambda name: list(stream_pairs(name))):
        with pytest.raises(InputError, match=r":3: .*stands twice.*c\.jsonl:1"):
            read(
                write(tmp_path / "c.jsonl", {"id": "x\x1b[2J", **row}, row, {"id": "x\x1b[2J", **row, "rejected": "z"})
            )


@pytest.mark.parametrize("turns", [[99], [-1], [0], [True], ["1"], [], 1])
def test_turns_to_learn_are_the_assistants(turns: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(InputError, match=r":1: .*train_turns"):
        read_demonstrations(write(tmp_path / "d.jsonl", {"messages": messages, "train_turns": turns}))


def test_a_label_file_with_an_abstention_is_read(tmp_path: Path) -> None:
    """As an earlier Solon wrote it: without the keys that were None."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": None, "abstained": True,
           "judgements": [{"principle": "p", "abstained": "the server answered 400"}]}  # fmt: skip
    [c] = read_comparisons(write(tmp_path / "c.jsonl", row))
    assert c.label is None and c.judgements[0].forward is None
    assert read_comparisons(write(tmp_path / "d.jsonl", c.to_json())) == [c]


def test_wrong_comparisons_are_named(tmp_path: Path) -> None:
    for row, says in (
        ({"prompt": "q", "chosen": "a"}, 'no "rejected"'),
        ({"chosen": HH + "x", "rejected": "\n\nHuman: other\n\nAssistant: y"}, "share their prompt"),
        ({"chosen": "no transcript", "rejected": HH}, "not an HH transcript"),
    ):
        with pytest.raises(InputError, match=says):
            read_comparisons(write(tmp_path / "bad.jsonl", row))


def test_a_transcript_keeps_words_that_look_like_turns() -> None:
    [first, second] = parse_transcript("\n\nHuman: he said Human: wait\n\nAssistant: ok")
    assert first.content == "he said Human: wait" and second.content == "ok"


def test_reference_comparisons_are_read(reference_data: Path) -> None:
    assert len(read_comparisons(str(reference_data / "hh-harmless-dev.jsonl.gz"))) == 1160


def test_what_ships_is_what_it_says() -> None:
    red, helpful = read_prompts("solon:red-team"), read_prompts("solon:helpful")
    red_held, helpful_held = read_prompts("solon:red-team-heldout"), read_prompts("solon:helpful-heldout")
    assert len(red) >= 300 and len(helpful) >= 300 and len(red_held) >= 80 and len(helpful_held) >= 80
    trained = {p.prompt[-1].content.lower() for p in [*red, *helpful]}
    assert len(trained) == len(red) + len(helpful)
    harmless = read_demonstrations("solon:demonstrations-harmless")
    demonstrations = harmless + read_demonstrations("solon:demonstrations-helpful")
    comparisons = read_comparisons("solon:comparisons-harmless") + read_comparisons("solon:comparisons-helpful")
    chains = read_revision_chains("solon:revision-demonstrations")
    assert len(harmless) >= 400 and len(demonstrations) >= 800 and len(comparisons) >= 600 and len(chains) >= 300
    sampled = read_comparisons("solon:comparisons-sampled")
    assert len(sampled) >= 250
    known = {p.id for p in load_constitution("solon").principles}
    assert {c.principle for c in [*comparisons, *sampled]} <= known
    assert {s.principle for c in chains for s in c.steps} == known
    held = {p.prompt[-1].content.lower() for p in [*red_held, *helpful_held]}
    seen = (
        trained
        | {d.messages[-2].content.lower() for d in demonstrations}
        | {c.prompt[-1].content.lower() for c in [*comparisons, *sampled]}
    )
    assert not held & (seen | {c.prompt[-1].content.lower() for c in chains})
    # choosing the longer answer must not win, or a reward model could learn length instead
    longer = sum(len(text_of(c.chosen)) > len(text_of(c.rejected)) for c in comparisons) / len(comparisons)
    assert 0.4 < longer < 0.6
    # One manner, but no template spinning: every answer is short, and no two share a third of their words in a row.
    answers = [d.messages[-1].content for d in demonstrations] + [c.steps[-1].revision for c in chains]
    assert max(map(words, answers)) <= 46
    grams = [{tuple(tokens(a)[n : n + 6]) for n in range(len(tokens(a)) - 5)} for a in answers]
    places: dict[tuple[str, ...], list[int]] = {}
    for n, found in enumerate(grams):
        for gram in found:
            places.setdefault(gram, []).append(n)
    shared = Counter(pair for rows in places.values() for pair in combinations(rows, 2))
    assert all(n < len(grams[a]) / 3 for (a, _), n in shared.items())


def test_what_is_held_out_is_of_kinds_that_no_training_set_has() -> None:
    def kinds(*names: str) -> set[str]:
        return {row["tags"][0] for name in names for _, row in read_jsonl(name)}

    trained = kinds("solon:red-team", "solon:helpful", "solon:demonstrations-harmless", "solon:demonstrations-helpful",
                    "solon:revision-demonstrations", "solon:comparisons-harmless", "solon:comparisons-helpful",
                    "solon:comparisons-sampled")  # fmt: skip
    held = kinds("solon:red-team-heldout", "solon:helpful-heldout", "solon:comparisons-heldout")
    assert len(trained) > 50 and len(held) == 20 and not trained & held
    twins = [row for _, row in read_jsonl("solon:helpful-heldout") if "sounds-risky" in row["tags"]]
    assert len(twins) == 40
