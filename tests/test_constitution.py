"""The laws of a constitution: it reads back as written, is known by what models see, names wrong lines."""

import re
from importlib import resources
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from solon.constitution import (
    Constitution,
    Example,
    Principle,
    builtin_names,
    diff,
    load_constitution,
    render_diff,
    to_yaml,
)
from solon.constitution.check import Entry, Length, Pattern, Readability, Repetition
from solon.constitution.files import parse_constitution
from solon.errors import InputError
from solon.yaml_text import LIMIT

calm = settings(deadline=None)  # a busy machine is no fault of the code

GOOD = """\
# a comment
name: good
version: "1.0"
description: For tests.
principles:
  - id: first
    title: First
    critique: >-
      Say of {response}
      what is wrong.
    revision: Rewrite it by {critique}
    comparison: Which is better?
    weight: 2
    tags: [harmlessness, short]
    examples:
      - prompt: p
        response: r
        critique: c
        revision: v
  - id: second
    title: Second
    critique: C
    revision: R
    comparison: Q
"""


def parse(text: str) -> Constitution:
    return parse_constitution(text.encode(), "c.yaml")


def principle(id: str = "p", **given: Any) -> Principle:
    return Principle(**{"id": id, "title": "T", "critique": "C", "revision": "R", "comparison": "Q", **given})


def constitution(*principles: Principle) -> Constitution:
    return Constitution(name="n", version="1", description="d", principles=principles)


# Text of every kind YAML treats in its own way; other braces are left to the tests of placeholders.
pieces = ["a word", " ", "\n", "\t", "- ", "# ", ": ", '"', "'", "\\", "long " * 30, "{response}"]
odd = ["true", "no", "null", "~", "1.10", "0x1", "2024-01-01", "<<", "=", "---", "...", "é\u2028\x85\ufeff"]
text = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="{}"), min_size=1),
    st.lists(st.sampled_from(pieces)).map("".join),
    st.sampled_from(odd),
).filter(str.strip)
no_braces = text.filter(lambda t: "{" not in t)
examples = st.builds(Example, prompt=text, response=text, critique=text, revision=text)
checks = st.one_of(
    st.builds(Length, max_words=st.integers(1, 1_000_000)),
    st.builds(Pattern, pattern=text.map(re.escape).filter(lambda t: len(t) <= 1000), forbid=st.booleans()),
    st.builds(Repetition, max=st.floats(0, 1, exclude_max=True), ngram=st.integers(1, 1_000_000)),
    st.builds(Readability, formula=st.just("flesch-reading-ease"), min=st.just(-1e9), max=st.floats(0, 1e300)),
    st.builds(Entry, function=st.sampled_from(["a.b:c", "no", "a-b"])),
)
principles = st.builds(
    Principle,
    id=st.from_regex(r"null|1e5|12|[a-z0-9]{1,4}(-[a-z0-9]{1,3}){0,2}", fullmatch=True),
    title=text,
    critique=text,
    revision=text,
    comparison=no_braces,
    weight=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    tags=st.lists(text, max_size=2).map(tuple),
    examples=st.lists(examples, max_size=2).map(tuple),
    check=st.none() | checks,
)
constitutions = st.builds(
    Constitution,
    name=text,
    version=text,
    description=text,
    principles=st.lists(principles, min_size=1, max_size=4, unique_by=lambda p: p.id).map(tuple),
)


@calm
@given(constitutions)
def test_what_is_written_loads_back_equal(made: Constitution) -> None:
    assert parse(to_yaml(made)) == made


@calm
@given(constitutions, st.data())
def test_the_fingerprint_changes_exactly_with_what_decides_the_requests(old: Constitution, data: st.DataObject) -> None:
    """Each field in turn takes a value drawn from elsewhere; the same value may come by chance."""
    n = data.draw(st.integers(0, len(old.principles) - 1))
    field = data.draw(st.sampled_from(list(Principle.model_fields)))
    value = getattr(data.draw(principles), field)
    assume(field != "id" or all(p.id != value for p in old.principles))
    changed = old.principles[n].model_copy(update={field: value})
    new = old.model_copy(update={"principles": (*old.principles[:n], changed, *old.principles[n + 1 :])})
    same = value == getattr(old.principles[n], field)
    assert (new.fingerprint == old.fingerprint) == (same or field in ("title", "tags"))


@calm
@given(constitutions, text)
def test_the_fingerprint_does_not_change_with_what_only_people_read(old: Constitution, new: str) -> None:
    update = {"name": new, "version": new, "description": new}
    assert old.model_copy(update=update).fingerprint == old.fingerprint


def test_the_fingerprint_does_not_change_with_how_the_yaml_looks() -> None:
    other = """
principles:
- comparison: 'Which is better?'
  examples: [{revision: v, critique: c, response: r, prompt: p}]
  tags: []
  weight: 2.00
  revision: |
    Rewrite it by {critique}
  critique: Say of {response}
    what is wrong.
  title: Another
  id: first
- {id: second, title: Second, critique: C, revision: R, comparison: "Q", weight: 1}
version: "2" # newer
name: other
description: Other.
"""
    assert parse(other).fingerprint == parse(GOOD).fingerprint
    assert parse(GOOD.replace("\n", "\r\n")) == parse(GOOD) == parse("\ufeff" + GOOD)


def test_order_reaches_the_fingerprint() -> None:
    a, b = principle("a"), principle("b")
    assert constitution(a, b).fingerprint != constitution(b, a).fingerprint
    e, f = (Example(prompt=x, response="r", critique="c", revision="v") for x in "ef")
    one, other = constitution(principle(examples=(e, f))), constitution(principle(examples=(f, e)))
    assert one.fingerprint != other.fingerprint


def test_the_fingerprint_stays_as_it_was_when_runs_were_made() -> None:
    """Runs keep it in every record: a new value here makes old runs unrecognisable."""
    fingerprint = parse(GOOD).fingerprint
    assert fingerprint == "5810a4c2f84f1241"


def test_a_constitution_cannot_be_edited() -> None:
    made = parse(GOOD)
    with pytest.raises(ValidationError):
        made.principles[0].weight = 3.0  # type: ignore[misc]


LISTED = GOOD[GOOD.index("  - id: first") :]
MISTAKES = {  # what: (text, put in its place, line, what is said)
    "quote never closed": ('"1.0"', '"1', 3, "not valid YAML"),
    "colon in bare text": ('"1.0"', "a: b", 3, "not valid YAML"),
    "bare braces": ("comparison: Q", "comparison: {response} x", 24, "not valid YAML"),
    "bracket never closed": ("comparison: Q\n", "comparison: [Q\n", 24, "not valid YAML"),
    "tab as indentation": ("title: First", "\ttitle: First", 7, "not valid YAML"),
    "control character": ("For tests.", "\x07", 4, "U+0007"),
    "escape beyond Unicode": ("title: Second", 'title:\n      "\\UFFFFFFFF"', 22, "not valid YAML"),
    "half a surrogate pair": ("title: Second", 'title: "\\ud800"', 21, "surrogate"),
    "key twice": ("name: good", "name: good\nname: bad", 3, '"name" is here twice, first on line 2'),
    "key twice, inside": ("title: Second", "id: other", 21, "twice, first on line 20"),
    "anchor": ("For tests.", "&a For tests.", 4, "an anchor (&a) is not allowed"),
    "alias": ("title: Second", "title: *a", 21, "an alias (*a) is not allowed"),
    "anchor on a key": ("title: Second", "&t title: Second", 21, "an anchor (&t) is not allowed"),
    "tag": ('"1.0"', "!!str 1.0", 3, "a tag (!!str) is not allowed"),
    "tag on a list": ("[harmlessness, short]", "!x [a]", 14, "a tag (!x) is not allowed"),
    "list as a key": ("name: good", "? [a]\n: good", 2, "a key must be a word"),
    "merge key": ("name: good", "<<: {name: good}", 2, 'unknown key "<<"'),
    "depth": ("[harmlessness, short]", "[[[[[[[[[[[[]]]]]]]]]]]]", 14, "nested too deeply"),
    "two documents": ("    comparison: Q\n", "    comparison: Q\n---\na: b\n", 25, "a second document"),
    "empty": (GOOD, "", 1, "the file is empty"),
    "only a comment": (GOOD, "# nothing\n", 1, "the file is empty"),
    "a list": (GOOD, "\n- a\n", 2, "the file holds a list; expected a mapping"),
    "text": (GOOD, "\n\nhello\n", 3, "the file holds text; expected a mapping"),
    "mistyped key": ("title: Second", "titel: Second", 21, '"titel"; did you mean "title"?'),
    "mistyped key on top": ("name: good", "nome: good", 2, '"nome"; did you mean "name"?'),
    "mistyped key in an example": ("- prompt: p", "- promt: p", 16, 'did you mean "prompt"?'),
    "unknown key": ("name: good", "name: good\nzzz: 1", 3, "the keys here are name, version"),
    "missing on top": ("name: good\n", "", 2, 'the constitution has no name; add "name:"'),
    "missing": ("    comparison: Q\n", "", 20, 'principle "second" has no comparison; add "comp'),
    "missing id": ("  - id: second\n    title", "  - title", 20, 'principle 2 has no id; add "id:"'),
    "missing in an example": ("        response: r\n", "", 16, '"first", example 1 has no response'),
    "empty text": ("critique: C", 'critique: "  "', 22, 'principle "second": critique is empty'),
    "no text": ("critique: C", "critique:", 22, 'principle "second": critique is empty'),
    "no text at the end": ("comparison: Q\n", "comparison:\n", 24, "comparison is empty"),
    "no tags": ("[harmlessness, short]", "", 14, "tags is empty; write a list of words, or remove"),
    "version a number": ('"1.0"', "1.10", 3, 'version is a number, not text; quote it: "1.10"'),
    "id a number": ("id: second", "id: 12", 20, 'quote it: "12"'),
    "text a bool": ("critique: C", "critique: true", 22, 'is a truth value, not text; quote it: "true"'),
    "text a mapping": ("critique: C", "critique: {response}", 22, "is a mapping, not text; quote it"),
    "tags text": ("[harmlessness, short]", "short", 14, "tags is text; expected a list of words"),
    "tag a number": ("[harmlessness, short]", "\n    - a\n    - 3", 16, "tags item 2 is a number"),
    "principles a mapping": (LISTED, "  a: b\n", 6, "principles is a mapping; expected a list"),
    "principle text": (LISTED, "  - a\n", 6, "principles item 1 is text; expected a mapping"),
    "no principles": ("\n" + LISTED, " []\n", 5, "principles is empty; add at least one"),
    "nothing in principles": (LISTED, "", 5, "principles is empty"),
    "id twice": ("id: second", "id: first", 20, 'id is "first", as of principle 1'),
    "id not kebab-case": ("id: second", "id: No_Harm", 20, 'joined by single hyphens, as in "no-harm"'),
    "id with a line break": ("id: second", 'id: "second\\n"', 20, r'id is "second\n"'),
    "weight zero": ("weight: 2", "weight: 0", 13, "weight is 0; expected a finite number above 0"),
    "weight negative": ("weight: 2", "weight: -1.5", 13, "weight is -1.5; expected"),
    "weight infinite": ("weight: 2", "weight: .inf", 13, "weight is .inf; expected"),
    "weight not a number": ("weight: 2", "weight: .nan", 13, "weight is .nan; expected"),
    "weight beyond floats": ("weight: 2", "weight: 1e999", 13, "weight is 1e999; expected"),
    "weight a bool": ("weight: 2", "weight: true", 13, "weight is true; expected"),
    "weight text": ("weight: 2", 'weight: "2"', 13, "weight is text; expected"),
    "no weight": ("weight: 2", "weight:", 13, "weight is empty; write a finite number"),
    "unknown placeholder": ("what is wrong.", "what is {wrong}.", 10, "critique holds {wrong}"),
    "critique in a critique": ("what is wrong.", "{critique}.", 10, "use {prompt} or {response}, or drop"),
    "unknown in a revision": ("revision: R\n", "revision: R {naïve}\n", 23, "revision holds {naïve}"),
    "in a comparison": ("comparison: Q", "comparison: Q {response}", 24, "comparison holds {response}"),
}


@pytest.mark.parametrize(("old", "new", "line", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_its_place(old: str, new: str, line: int, said: str) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(InputError) as e:
        parse(GOOD.replace(old, new, 1))
    message = str(e.value)
    assert message.startswith(f"c.yaml:{line}: ") and "\n" not in message
    assert said in message


def test_a_line_number_counts_lines_however_they_end() -> None:
    wrong = GOOD.replace("weight: 2", "weight: 0")
    for ending in ("\n", "\r\n", "\r"):
        with pytest.raises(InputError, match=r"^c\.yaml:13: "):
            parse(wrong.replace("\n", ending))


@calm
@given(st.binary(max_size=60) | st.text("ab:-{}[]&*!|>\"'#%?@\\ \n\t0.1", max_size=40).map(str.encode))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^c\.yaml:\d+: [^\n]+\Z"):
        parse_constitution(data, "c.yaml")


@calm
@given(st.integers(0, len(GOOD) - 1), st.sampled_from([*"ab:-{}[]&*!|>\"'#%?@\\ \n\t0.", ""]))
def test_one_wrong_character_loads_or_names_a_line(at: int, put: str) -> None:
    try:
        parse(GOOD[:at] + put + GOOD[at + 1 :])
    except InputError as e:
        line = int(str(e).split(":")[1])
        assert 1 <= line <= GOOD.count("\n") + 2 and "\n" not in str(e)


def test_bytes_that_are_not_utf8_are_named_by_their_line() -> None:
    with pytest.raises(InputError, match=r"^c\.yaml:4: this line is not UTF-8"):
        parse_constitution(GOOD.encode().replace(b"For tests", b"For t\xe9sts"), "c.yaml")


def test_a_file_may_be_a_mebibyte_and_no_more(tmp_path: Any) -> None:
    file = tmp_path / "big.yaml"
    file.write_text(GOOD + "#" * (LIMIT - len(GOOD)))
    assert load_constitution(str(file)) == parse(GOOD)
    file.write_text(GOOD + "#" * (LIMIT - len(GOOD) + 1))
    with pytest.raises(InputError, match=r"big\.yaml:1: the file is over 1 MiB"):
        load_constitution(str(file))


def test_braces_that_name_nothing_stay() -> None:
    kept = 'Answer as {"a": 1}, {}, {1} or { prompt }, of {prompt} and {response}.'
    assert principle(critique=kept, revision=kept, comparison="{x}").critique == kept


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_constitution_loads_and_writes_back(name: str) -> None:
    made = load_constitution(name)
    assert parse(to_yaml(made)) == made


def test_the_built_in_names_are_the_files_of_the_library() -> None:
    library = resources.files("solon.constitution") / "library"
    files = [f.name for f in library.iterdir() if f.name.endswith(".yaml")] if library.is_dir() else []
    assert builtin_names() == sorted(f.removesuffix(".yaml") for f in files)


def test_an_unknown_name_is_told_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solon.constitution.files.builtin_names", lambda: ["anthropic", "solon"])
    with pytest.raises(InputError, match=r'"solan"; did you mean "solon"\? built in: anthropic, solon'):
        load_constitution("solan")


def test_what_cannot_be_read_says_why(tmp_path: Any) -> None:
    for spec in (str(tmp_path), "a\0b", ""):
        with pytest.raises(InputError, match=r"^(cannot read|no constitution)[^\n]+\Z"):
            load_constitution(spec)


@calm
@given(constitutions, constitutions)
def test_a_diff_is_empty_for_equals_and_reaches_a_model_where_fingerprints_differ(
    old: Constitution, new: Constitution
) -> None:
    changes = diff(old, new)
    assert diff(old, old) == []
    assert bool(changes) == (old != new)
    assert any(c.reaches_model for c in changes) == (old.fingerprint != new.fingerprint)


@calm
@given(st.permutations("abcdef"), st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("uvw")))
def test_a_diff_says_what_came_went_and_moved(order: list[str], gone: set[str], new: set[str]) -> None:
    old = constitution(*(principle(i) for i in "zabcdef"))
    after = ["z", *(i for i in order if i not in gone), *sorted(new)]
    changes = diff(old, constitution(*(principle(i) for i in after)))
    named = {kind: {c.principle for c in changes if c.kind == kind} for kind in ("added", "removed", "moved")}
    assert named["added"] == new and named["removed"] == gone
    stayed = [i for i in after if i not in named["moved"] | new]
    assert stayed == sorted(stayed, key="zabcdef".index)  # those said to have stayed are still in order
    shuffled = [i for i in after if i not in new]
    assert not named["moved"] or shuffled != sorted(shuffled, key="zabcdef".index)


def test_one_principle_moved_is_one_change() -> None:
    old = constitution(*(principle(i) for i in "abcde"))
    new = constitution(*(principle(i) for i in "bcdea"))
    (change,) = diff(old, new)
    assert (change.kind, change.principle, change.before, change.after) == ("moved", "a", 1, 5)


def test_a_diff_names_the_field_and_whether_a_model_sees_it() -> None:
    old, new = constitution(principle()), constitution(principle(title="New", revision="Better"))
    seen = [(c.principle, c.field, c.before, c.after, c.reaches_model) for c in diff(old, new)]
    assert seen == [("p", "title", "T", "New", False), ("p", "revision", "R", "Better", True)]
    shown = render_diff(diff(old, new))
    assert "~ p, title  (no model sees this)" in shown and "    + Better" in shown
    assert shown.endswith("2 changes: 1 reaches a model")
    assert render_diff([]) == "no differences"


@calm
@given(constitutions, constitutions)
def test_a_shown_diff_holds_no_control_characters(old: Constitution, new: Constitution) -> None:
    shown = render_diff(diff(old, new))
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_one_question_is_a_constitution() -> None:
    made = Constitution.from_question("Which is kinder?")
    assert [(p.id, p.comparison) for p in made.principles] == [("question", "Which is kinder?")]
    assert made.fingerprint != Constitution.from_question("Which is safer?").fingerprint
    assert parse(to_yaml(made)) == made
    for wrong in (" ", "Is {response} kind?"):
        with pytest.raises(InputError, match=r"^the question "):
            Constitution.from_question(wrong)
