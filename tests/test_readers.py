"""Readers: the field's formats are read as they are; a wrong line is named; what ships is what it says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from solon.constitution import load_constitution
from solon.errors import InputError
from solon.prompts import read_comparisons, read_demonstrations, read_pairs, read_prompts, read_revision_chains
from solon.prompts.readers import parse_transcript
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
        (['{"prompt": "a"}', '{"prompt": "a"}'], "stands twice"),
        ([], "is empty"),
    ],
)
def test_a_wrong_line_is_named(lines: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as error:
        read_prompts(write(tmp_path / "bad.jsonl", *lines))
    assert "\n" not in str(error.value)


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
    assert len(red) >= 160 and len(helpful) >= 160 and len(red_held) >= 48 and len(helpful_held) >= 48
    trained = {p.prompt[-1].content.lower() for p in [*red, *helpful]}
    assert len(trained) == len(red) + len(helpful)
    harmless = read_demonstrations("solon:demonstrations-harmless")
    demonstrations = harmless + read_demonstrations("solon:demonstrations-helpful")
    comparisons = read_comparisons("solon:comparisons-harmless") + read_comparisons("solon:comparisons-helpful")
    chains = read_revision_chains("solon:revision-demonstrations")
    assert len(demonstrations) >= 200 and len(comparisons) >= 240 and len(chains) >= 100
    known = {p.id for p in load_constitution("solon").principles}
    assert {c.principle for c in comparisons} <= known
    assert {s.principle for c in chains for s in c.steps} == known
    held = {p.prompt[-1].content.lower() for p in [*red_held, *helpful_held]}
    seen = (
        trained
        | {d.messages[-2].content.lower() for d in demonstrations}
        | {c.prompt[-1].content.lower() for c in comparisons}
    )
    assert not held & (seen | {c.prompt[-1].content.lower() for c in chains})
    # choosing the longer answer must not win, or a reward model could learn length instead
    longer = sum(len(text_of(c.chosen)) > len(text_of(c.rejected)) for c in comparisons) / len(comparisons)
    assert 0.4 < longer < 0.6
    # no template spinning: hardly two answers open with the same three words
    openings = [" ".join(d.messages[-1].content.split()[:3]) for d in demonstrations]
    assert len(set(openings)) > 0.9 * len(openings)
