"""Laws of verifiable principles: bounds are kept at the bound, order and white space play no part, slips are named."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from solon.cli import app
from solon.constitution import Constitution, Principle, diff, inline_check, load_constitution, render_diff, to_yaml
from solon.constitution.check import KINDS, Check, Entry, Length, Pattern, Readability, Repetition
from solon.constitution.files import parse_constitution
from solon.errors import InputError
from solon.feedback import checks
from solon.feedback.checks import CERTAIN, judge_by_check, require_runnable, satisfies, syllables
from solon.feedback.labels import combine, log_odds
from solon.recipes.recipe import load_recipe
from solon.records import Judgement, user
from solon.report.run import run_recipe

PROMPT = (user("hello"),)
calm = settings(deadline=None)  # a busy machine is no fault of the code


def principle(check: Check | None, **given: Any) -> Principle:
    return Principle(id="p", title="T", critique="C", revision="R", comparison="Q", check=check, **given)


def constitution(check: Check | None) -> Constitution:
    return Constitution(name="n", version="1", description="d", principles=(principle(check),))


def judged(check: Check, first: str, second: str, **given: Any) -> Judgement:
    return judge_by_check(principle(check), PROMPT, first, second, **given)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of user's functions, named anew for each test, since what is loaded is kept."""
    name = f"functions_{time.monotonic_ns()}"
    module = SimpleNamespace(
        polite=lambda prompt, response: "please" in response,
        graded=lambda prompt, response: float(response),
        fails=lambda prompt, response: 1 / 0,
        says=lambda prompt, response: response,
        first_word=lambda prompt, response: response.startswith(prompt[-1].content),
        number=3,
    )
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(checks.ALLOW, raising=False)
    return name


BUILT_IN: list[Check] = [
    Pattern(pattern=r"\bplease\b"),
    Pattern(pattern="(?m)^- ", forbid=True),
    Pattern(pattern=r"(?s)\A\S.*\S\Z"),
    Length(max_words=5),
    Length(min_words=2, max_characters=30),
    Readability(formula="flesch-reading-ease", min=60),
    Readability(formula="flesch-kincaid-grade", max=6),
    Repetition(max=0.2, ngram=2),
]
some_checks = st.sampled_from(BUILT_IN)
pieces = st.sampled_from(["please", "- ", "Word", "insurmountability", ". ", "\n", "a b a b a b", "é", "!", " ", ""])
responses = st.lists(pieces, max_size=12).map(" ".join) | st.text(max_size=40)


# --- laws --------------------------------------------------------------------------------------------------


@calm
@given(some_checks, responses, responses)
def test_swapping_the_responses_mirrors_the_label(check: Check, a: str, b: str) -> None:
    one, other = judged(check, a, b), judged(check, b, a)
    assert one.forward is not None and other.forward is not None
    assert one.forward == one.swapped and other.forward == other.swapped
    assert one.forward == pytest.approx(1 - other.forward)


@calm
@given(some_checks, responses, st.text(" \t\n\r\x0b\u2028", max_size=3), st.text(" \t\n\r", max_size=3))
def test_white_space_around_a_response_changes_nothing(check: Check, text: str, before: str, after: str) -> None:
    assert satisfies(check, PROMPT, before + text + after) == satisfies(check, PROMPT, text)


@calm
@given(some_checks.filter(lambda c: c.kind != "pattern"), responses, st.sampled_from(["  ", "\t", " \t "]))
def test_nor_does_its_width_within_one(check: Check, text: str, wide: str) -> None:
    assert satisfies(check, PROMPT, text.replace(" ", wide)) == satisfies(check, PROMPT, text)


@calm
@given(some_checks, st.text("\n\t :.!?>-*\u200b", max_size=12))
def test_a_response_without_a_word_keeps_no_check(check: Check, text: str) -> None:
    assert satisfies(check, PROMPT, text) == 0


@calm
@given(some_checks, responses, responses)
def test_a_label_says_who_keeps_it(check: Check, a: str, b: str) -> None:
    kept = satisfies(check, PROMPT, a), satisfies(check, PROMPT, b)
    expected = {(1, 0): CERTAIN, (0, 1): 1 - CERTAIN, (1, 1): 0.5, (0, 0): 0.5}[kept]
    found = judged(check, a, b)
    assert found.forward == (0.5 if expected == 0.5 else pytest.approx(expected))
    assert found.kind == "check" and found.abstained is None


def test_a_judgement_has_its_principles_name_and_weight() -> None:
    found = judge_by_check(principle(Length(max_words=1), weight=2.5), PROMPT, "one", "one two")
    assert (found.principle, found.weight) == ("p", 2.5)


def test_a_check_is_outvoted_by_a_principle_of_equal_weight_that_is_surer() -> None:
    against = Judgement(principle="model", forward=0.02, swapped=0.02)
    for_it = judge_by_check(principle(Length(max_words=1)), PROMPT, "one", "one two")
    assert combine([for_it, against]) < 0.5 < combine([for_it.model_copy(update={"weight": 2.0}), against])


# --- each kind at its bound --------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40))
def test_length_counts_words_with_both_bounds_included(n: int, bound: int) -> None:
    text = " ".join(["word"] * n)
    assert satisfies(Length(max_words=bound), PROMPT, text) == (n <= bound)
    assert satisfies(Length(min_words=bound), PROMPT, text) == (n >= bound)


@given(st.integers(1, 40), st.integers(1, 40))
def test_length_counts_characters_with_both_bounds_included(n: int, bound: int) -> None:
    assert satisfies(Length(max_characters=bound), PROMPT, "é" * n) == (n <= bound)
    assert satisfies(Length(min_characters=bound), PROMPT, "é" * n) == (n >= bound)


def test_a_run_of_white_space_is_one_character_and_equal_bounds_may_be_met() -> None:
    assert satisfies(Length(min_characters=3, max_characters=3), PROMPT, "a \n\n b") == 1


@pytest.mark.parametrize("text", ["I say please.", "PLEASE", "pleased", "no"])
def test_what_a_pattern_demands_its_twin_forbids(text: str) -> None:
    demanded = satisfies(Pattern(pattern=r"\bplease\b"), PROMPT, text)
    assert demanded == (text == "I say please.")
    assert satisfies(Pattern(pattern=r"\bplease\b", forbid=True), PROMPT, text) == 1 - demanded


def test_repetition_at_its_bound() -> None:
    text = "a b a b a"  # pairs of words: ab ba ab ba, of which two repeat
    assert satisfies(Repetition(max=0.5, ngram=2), PROMPT, text) == 1
    assert satisfies(Repetition(max=0.49, ngram=2), PROMPT, text) == 0


def test_readability_is_the_published_formula() -> None:
    """Six words, one sentence, six syllables: 206.835 - 1.015 * 6 - 84.6 and 0.39 * 6 + 11.8 - 15.59."""
    text = "The cat sat on the mat."
    assert checks.readability(text, "flesch-reading-ease") == pytest.approx(116.145)
    assert checks.readability(text, "flesch-kincaid-grade") == pytest.approx(-1.45)
    assert satisfies(Readability(formula="flesch-reading-ease", min=116.1), PROMPT, text) == 1
    assert satisfies(Readability(formula="flesch-reading-ease", min=116.2), PROMPT, text) == 0
    assert satisfies(Readability(formula="flesch-kincaid-grade", max=-1.4), PROMPT, text) == 1
    assert satisfies(Readability(formula="flesch-kincaid-grade", max=-1.5), PROMPT, text) == 0


def test_sentences_end_where_a_reader_sees_them_end() -> None:
    one = checks.readability("It is 3.5 miles to go", "flesch-kincaid-grade")
    assert one == checks.readability("It is 3 5 miles to go", "flesch-kincaid-grade")  # a decimal point ends none
    lists = ["- a cat\n- a dog", "A cat. A dog.", 'A cat." A dog!)', "A cat?! A dog..."]
    assert len({checks.readability(text, "flesch-kincaid-grade") for text in lists}) == 1


SPOKEN = "the 1, table 2, cake 1, boxes 2, wanted 2, walked 1, makes 1, judges 2, wishes 2, once 1, readability 5, 7 1"


@pytest.mark.parametrize("said", SPOKEN.split(", "))
def test_syllables(said: str) -> None:
    word, count = said.split()
    assert syllables(word) == int(count)


@pytest.mark.parametrize("pattern", [r"(a|a)*$", r"(.*a){20}$", r"(x+x+)+y"])
def test_a_pattern_that_takes_too_long_abstains(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PATTERN_SECONDS", 0.05)
    began = time.process_time()
    found = judged(Pattern(pattern=pattern), "a" * 4000 + "x" * 4000 + "!", "fine")
    assert found.forward is None and found.abstained is not None and "timed out" in found.abstained
    assert time.process_time() - began < 5  # without the bound: longer than anyone waits


# --- functions of the user's -------------------------------------------------------------------------------


def test_a_function_runs_only_where_the_user_allows_it(functions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Entry(function=f"{functions}:polite")
    for allowed in (None, False):
        with pytest.raises(InputError, match=rf"^[^\n]*{checks.ALLOW}=1[^\n]*allow_code=True[^\n]*\Z"):
            judged(check, "please", "no", allow_code=allowed)
        with pytest.raises(InputError, match=checks.ALLOW):
            require_runnable([principle(check)], allow_code=allowed)
    assert judged(check, "please", "no", allow_code=True).forward == pytest.approx(CERTAIN)
    monkeypatch.setenv(checks.ALLOW, "1")
    require_runnable([principle(check), principle(None)])
    assert judged(check, "no", "please").forward == pytest.approx(1 - CERTAIN)
    with pytest.raises(InputError, match=checks.ALLOW):  # what the caller says goes before the environment
        judged(check, "please", "no", allow_code=False)


@given(st.floats(0, 1), st.floats(0, 1))
@example(0.0, 1.0)
def test_grades_count_by_their_difference_in_log_odds(a: float, b: float) -> None:
    name = "graded_by_a_float"
    sys.modules[name] = SimpleNamespace(graded=lambda prompt, response: float(response))  # type: ignore[assignment]
    found = judged(Entry(function=f"{name}:graded"), repr(a), repr(b), allow_code=True).forward
    assert found is not None
    assert log_odds(found) == pytest.approx((a - b) * log_odds(CERTAIN), abs=1e-9)


def test_a_function_sees_the_prompt_and_the_response(functions: str) -> None:
    check = Entry(function=f"{functions}:first_word")
    assert satisfies(check, PROMPT, "hello you", allow_code=True) == 1
    assert satisfies(check, PROMPT, "you", allow_code=True) == 0


@pytest.mark.parametrize(
    ("function", "response", "why"),
    [
        ("fails", "x", "ZeroDivisionError"),
        ("graded", "1.5", "answers True, False or a number in 0..1"),
        ("graded", "nan", "answers True, False or a number in 0..1"),
        ("says", "1", "answers True, False or a number in 0..1"),
    ],
)
def test_a_function_that_fails_abstains_with_its_reason(functions: str, function: str, response: str, why: str) -> None:
    found = judged(Entry(function=f"{functions}:{function}"), response, response, allow_code=True)
    assert found.forward is found.swapped is None
    assert found.abstained is not None and why in found.abstained
    assert combine([found]) is None


def test_a_function_that_is_not_there_is_one_line(functions: str) -> None:
    for name, why in (
        ("no_such_module:f", "No module"),
        (f"{functions}:x", "no attribute"),
        (f"{functions}:number", "int"),
    ):
        with pytest.raises(InputError, match=rf"^[^\n]*{why}[^\n]*\Z"):
            judged(Entry(function=name), "a", "b", allow_code=True)


def test_an_installed_check_needs_no_permission(functions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = functions.replace("_", "-")
    entry = SimpleNamespace(name=name, load=lambda: sys.modules[functions].polite)
    monkeypatch.setattr(checks, "entry_points", lambda group: [entry] if group == "solon.checks" else [])
    assert satisfies(Entry(function=name), PROMPT, "please") == 1
    with pytest.raises(InputError, match=rf'did you mean "{name}"'):
        satisfies(Entry(function=name + "x"), PROMPT, "please")


# --- in a constitution -------------------------------------------------------------------------------------

GOOD = """\
name: good
version: "1.0"
description: For tests.
principles:
  - id: first
    title: First
    critique: C
    revision: R
    comparison: Q
    check: {CHECK}
    weight: 2
"""
NUMBER = "expected a whole number from 1 to a million, without quotes, or remove the key"
MISTAKES = {  # the check: what is said after 'principle "first"'
    "": ": check is empty; write a mapping with kind",
    "short": ": check is text; expected a mapping with kind",
    "[length]": ": check is a list; expected a mapping with kind",
    "{max_words: 3}": ': check has no kind; add "kind:", one of pattern, length, readability, repetition, entry',
    "{kind: lenght}": ', check: kind is "lenght"; did you mean "length"?',
    "{kind: 3}": ", check: kind is a number; expected one of pattern",
    "{kind: [length]}": ", check: kind is a list; expected one of pattern",
    "{kind: , max_words: 3}": ", check: kind is empty; write one of pattern",
    "{kind: length}": ": check has no bound; add min_words, max_words, min_characters or max_characters",
    "{kind: length, max_word: 3}": ', check: unknown key "max_word"; did you mean "max_words"?',
    "{kind: length, max_words: 0}": f", check: max_words is 0; {NUMBER}",
    "{kind: length, max_words: 1000001}": f", check: max_words is 1000001; {NUMBER}",
    "{kind: length, max_words: 2.5}": f", check: max_words is 2.5; {NUMBER}",
    "{kind: length, max_words: true}": f", check: max_words is true; {NUMBER}",
    '{kind: length, max_words: "3"}': f", check: max_words is text; {NUMBER}",
    "{kind: length, min_words: 3, max_words: }": ", check: max_words is empty; write a whole number from 1 to a million, or remove",
    "{kind: length, min_words: 3, max_words: 2}": ": check has a min_words above its max_words",
    "{kind: pattern}": ', check has no pattern; add "pattern:"',
    '{kind: pattern, pattern: "a("}': ", check: pattern is not a regular expression: missing ) at position 2",
    "{kind: pattern, pattern: 3}": ', check: pattern is a number, not text; quote it: "3"',
    "{kind: pattern, pattern: a, forbid: yes}": ", check: forbid is text; expected true or false, without quotes",
    '{kind: pattern, pattern: "((a{100}){100}){100}"}': ", check: pattern has counts that multiply to more than 100000",
    '{kind: pattern, pattern: "a(?R)?b"}': ", check: pattern calls itself",
    f'{{kind: pattern, pattern: "{"(" * 500}{")" * 500}"}}': ", check: pattern is not a regular expression",
    f"{{kind: pattern, pattern: {'a' * 1001}}}": ", check: pattern is longer than 1000 characters",
    "{kind: readability, min: 3}": ', check has no formula; add "formula:"',
    "{kind: readability, formula: flesch-reading-easy, min: 3}": ', check: formula is "flesch-reading-easy"; did you',
    "{kind: readability, formula: flesch-reading-ease}": ": check has no bound; add min or max",
    "{kind: readability, formula: flesch-reading-ease, min: .inf}": ", check: min is .inf; expected a finite number",
    "{kind: repetition}": ', check has no max; add "max:", a share',
    "{kind: repetition, max: 1}": ", check: max is 1; expected a share from 0 to below 1",
    '{kind: entry, function: "os.system(1)"}': ', check: function is "os.system(1)"; expected module:function',
}


def load(check: str) -> Constitution:
    return parse_constitution(GOOD.replace("{CHECK}", check).encode(), "c.yaml")


@pytest.mark.parametrize(("check", "said"), MISTAKES.items(), ids=[m[:40] for m in MISTAKES])
def test_a_wrong_check_is_one_line_that_names_its_place(check: str, said: str) -> None:
    with pytest.raises(InputError) as e:
        load(check)
    message = str(e.value)
    assert message.startswith(f'c.yaml:10: principle "first"{said}') and "\n" not in message


def test_the_line_is_the_parameters_own() -> None:
    with pytest.raises(InputError, match=r"^c\.yaml:13: .*max_words"):
        load("\n      kind: length\n      min_words: 3\n      max_words: none")


@pytest.mark.parametrize("check", [*BUILT_IN, Entry(function="a.b:c"), Entry(function="a-name"), None], ids=str)
def test_a_check_is_written_so_that_it_loads_back(check: Check | None) -> None:
    made = constitution(check)
    assert parse_constitution(to_yaml(made).encode(), "c.yaml") == made


def test_only_what_a_check_says_counts_for_its_fingerprint() -> None:
    assert (
        load("{kind: length, max_words: 3}").fingerprint
        == load("\n      max_words: 3.0\n      kind: length").fingerprint
    )
    one = {constitution(c).fingerprint for c in (*BUILT_IN, None)}
    assert len(one) == len(BUILT_IN) + 1
    minus = Readability(formula="flesch-kincaid-grade", max=-0.0)
    assert (
        constitution(minus).fingerprint == constitution(Readability(formula="flesch-kincaid-grade", max=0)).fingerprint
    )


def test_a_constitution_without_checks_keeps_its_fingerprint() -> None:
    """As they were before there were checks; where a text of one is edited, its value here changes and is right to."""
    assert constitution(None).fingerprint == "7b48d19b6a6f8358"
    found = {name: load_constitution(name).fingerprint for name in ("solon", "simple", "bank")}
    assert found == {"solon": "e9516dbb668bc01e", "simple": "9d197ae107f11f71", "bank": "7e23d97682a2dd7b"}


def test_a_diff_shows_the_check_and_that_it_reaches_a_model() -> None:
    (change,) = diff(constitution(None), constitution(Length(max_words=3)))
    assert (change.field, change.reaches_model) == ("check", True)
    assert "    - (none)\n    + {kind: length, max_words: 3}" in render_diff([change])


def test_a_check_is_shown_as_it_is_written() -> None:
    assert inline_check(Pattern(pattern="^#", forbid=True)) == '{kind: pattern, pattern: "^#", forbid: true}'
    assert inline_check(Repetition(max=0.2)) == "{kind: repetition, max: 0.2}"


def test_the_documented_constitution_loads_and_every_kind_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "constitution.md").read_text(encoding="utf-8")
    made = parse_constitution(page.split("```yaml\n")[1].split("```")[0].encode(), "constitution.md")
    assert made.principles[1].check == Length(min_words=5, max_words=120)
    for kind, model in KINDS.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{kind}` |"))
        assert all(f"`{name}`" in row for name in model.model_fields if name != "kind")


def test_certain_is_certain_enough_and_no_more() -> None:
    assert 2.9 < log_odds(CERTAIN) < 3 and math.isfinite(log_odds(1 - CERTAIN))


@pytest.mark.parametrize("recipe", ["rlaif", "tiny"])
def test_a_run_with_a_check_that_cannot_run_here_ends_before_a_model_is_loaded(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(constitution(Entry(function="no-such-check"))))
    overrides = {"constitution": str(path), "model": str(tmp_path / "no-model"), "feedback.question": None}
    with pytest.raises(InputError, match='no installed check is named "no-such-check"'):
        run_recipe(load_recipe(recipe, overrides), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [["label", "--pairs", "p.jsonl", "--out", "o.jsonl"], ["evaluate", "--suite", "hhh", "--file", "p.jsonl"]],
)
def test_a_command_with_a_check_that_cannot_run_here_ends_with_one_line(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(constitution(Entry(function="no-such-check"))))
    done = CliRunner().invoke(app, [*command, "--constitution", str(path), "--model", "tiny-random"])
    assert isinstance(done.exception, InputError) or done.exit_code == 2
    assert 'no installed check is named "no-such-check"' in str(done.exception) + done.output
