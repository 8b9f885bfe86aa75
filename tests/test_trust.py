"""Laws of trust: every planted fault is measured and named, a fair judge raises nothing, memory stays flat."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solon.constitution import Constitution, Principle
from solon.engines import ScoreRequest, ScriptedEngine
from solon.feedback.labels import log_odds, sigmoid
from solon.feedback.settings import JudgeSettings
from solon.feedback.trust import REASONS, Trust
from solon.measures.statistics import Ratio
from solon.recipes.recipe import load_recipe
from solon.records import Comparison, Judgement, Pair, assistant, user
from solon.report.render import render_html, render_markdown
from solon.runs.run import Run
from solon.stages.artifacts import DATA, HELDOUT_JUDGED, JUDGE
from solon.stages.judge_heldout import JudgeHeldout
from solon.stages.judging import trust_in
from solon.stages.plots import reliability
from tests.asking import compare

N = 400
RULES = Constitution(
    name="two",
    version="1",
    description="for tests",
    principles=tuple(
        Principle(id=i, title=i, critique="c", revision="r", comparison=f"Which is {i}?") for i in ("kind", "true")
    ),
)
Prefer = Callable[[str, str], tuple[float | None, float | None]]


@cache
def responses() -> dict[str, float]:
    """Texts of 1 to 40 words, each with a quality, 0..1, that its length does not tell."""
    rng = random.Random(1)
    return {" ".join([f"text{i}"] + ["word"] * rng.randrange(40)): rng.random() for i in range(2 * N)}


def judged(prefer: Prefer, people: str | None = None, authors: tuple[str, str] | None = None, n: int = N) -> dict:
    """The summary of a planted judge over n pairs. people: what decides their labels, "quality", or None.

    prefer sees the two texts in the order shown, and gives their log-probabilities.
    """
    quality = responses()
    texts = list(quality)
    pairs = []
    for i in range(n):
        a, b = texts[2 * i], texts[2 * i + 1]
        human = float(quality[a] > quality[b]) if people else None
        pairs.append(Pair(id=str(i), prompt=(user(f"hello {i}"),), responses=(a, b), human=human, authors=authors))
    trust = Trust("judge")
    for c in compare(
        pairs, ScriptedEngine(prefer=lambda r: prefer(*shown(r))), RULES, JudgeSettings(principles_per_pair=None)
    ):
        trust.add(c)
    return trust.summary()


def shown(request: ScoreRequest) -> tuple[str, str]:
    """The texts of (A) and (B)."""
    assert request.question is not None
    a, b = request.question.criteria
    return a, b


def fair(a: str, b: str) -> tuple[float, float]:
    """Knows the quality of the responses and nothing else."""
    quality = responses()
    return 4 * quality[a], 4 * quality[b]


def only(found: dict[str, Any], *words: str) -> None:
    """The findings are these and no others, in their order, each known by some of its words."""
    assert len(found["findings"]) == len(words), found["findings"]
    assert all(word in said for word, said in zip(words, found["findings"], strict=True)), found["findings"]


# --- planted judges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("people", [None, "quality"])
def test_a_fair_judge_raises_no_finding(people: str | None) -> None:
    found = judged(fair, people)
    only(found)
    assert found["position"]["contradictions"]["value"] == 0 and found["ties"]["pairs"]["value"] == 0
    assert found["position"]["first_shown"]["value"] == 0.5
    assert found["position"]["bias"]["value"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("place", "lean", "share"), [("first", 3.0, 1.0), ("last", -3.0, 0.0)])
def test_a_judge_that_picks_a_place_is_exposed(place: str, lean: float, share: float) -> None:
    found = judged(lambda a, b: (lean, 0.0))
    only(found, "contradicts itself", f"prefers the {place} position", "neither")
    position = found["position"]
    assert position["contradictions"]["value"] == 1 and position["contradictions"]["n"] == 2 * N
    assert position["first_shown"]["value"] == share and position["first_shown"]["n"] == 4 * N
    assert position["bias"]["value"] == pytest.approx(lean)
    assert found["ties"]["contradictory_pairs"] == N and found["ties"]["contradictory_judgements"] == 2 * N


@pytest.mark.parametrize("lean", [0.0, 0.7, -3.0])
def test_the_bias_is_what_being_shown_first_adds(lean: float) -> None:
    def prefer(a: str, b: str) -> tuple[float, float]:
        good, bad = fair(a, b)
        return good + lean, bad

    position = judged(prefer)["position"]
    assert position["bias"]["value"] == pytest.approx(lean, abs=1e-6)
    # of the contradictions every one goes to the preferred place, both answers; of the other pairs, one of two
    towards = position["contradictions"]["value"] * (1 if lean > 0 else -1)
    assert position["first_shown"]["value"] == pytest.approx(0.5 + towards / 2)


@pytest.mark.parametrize(("sign", "preferred"), [(1, "longer"), (-1, "shorter")])
def test_a_judge_that_picks_by_length_is_exposed(sign: int, preferred: str) -> None:
    def prefer(a: str, b: str) -> tuple[float, float]:
        return sign * len(a) / 100, sign * len(b) / 100

    found = judged(prefer)
    only(found, f"prefers the {preferred} response")
    length = found["length"]
    assert length["words"]["judge"]["value"] == length["characters"]["judge"]["value"] == (sign + 1) / 2
    assert length["words"]["people"]["n"] == 0 and length["words"]["people"]["value"] is None
    found = judged(prefer, people="quality")
    # people's choice does not follow length, so that this judge is also right by chance only
    only(found, f"prefers the {preferred} response more often than people do", "coin", "too sure")
    beside = found["length"]["words"]
    assert 0.4 < beside["people"]["value"] < 0.6
    assert beside["difference"]["value"] == pytest.approx(beside["judge"]["value"] - beside["people"]["value"])
    assert abs(beside["opportunity_gap"]["value"]) == 1


def test_a_judge_that_prefers_the_longer_as_people_do_raises_no_finding() -> None:
    trust = Trust()
    for i in range(N):
        trust.add(comparison(i, 0.9, chosen="three words here", rejected="one", human=1.0))
    found = trust.summary()
    assert found["length"]["words"]["judge"]["value"] == 1
    only(found)


def test_responses_of_one_length_say_nothing_of_length() -> None:
    trust = Trust()
    trust.add(comparison(0, 0.9, chosen="two words", rejected="three more words"))
    trust.add(comparison(1, 0.9, chosen="two words", rejected="other ones"))
    length = trust.summary()["length"]
    assert length["words"]["judge"]["n"] == 1 and length["characters"]["judge"]["n"] == 2


def test_a_judge_that_only_errs_prefers_no_length() -> None:
    """People prefer the longer in four of five; a judge that errs in three of ten picks it less often, either way."""
    rng, trust = random.Random(0), Trust("long")
    for i in range(2000):
        people, right = float(rng.random() < 0.8), rng.random() < 0.7
        label = 0.7 if right == bool(people) else 0.3
        texts = {"chosen": "three words here", "rejected": "one"}
        trust.add(comparison(i, label, human=people, authors=("long", "short"), **texts))
    found = trust.summary()
    assert found["length"]["words"]["difference"]["high"] < -0.05  # so that the share alone would accuse it
    assert abs(found["self_preference"]["opportunity_gap"]["value"]) < 0.05
    only(found)


def test_a_judge_that_sees_large_differences_better_prefers_nothing() -> None:
    """Its own are better by much and another's by little, so that it errs less on its own: no fault of the judge."""
    rng, trust = random.Random(0), Trust("own")
    for i in range(2000):
        better_by = rng.gauss(1, 1)
        label = 0.7 if better_by + rng.gauss(0, 1) > 0 else 0.3
        trust.add(comparison(i, label, human=float(better_by > 0), authors=("own", "other")))
    found = trust.summary()
    assert found["self_preference"]["opportunity_gap"]["low"] > 0.05  # so that the gap alone would accuse it
    only(found)


def test_one_pair_that_people_decided_says_nothing() -> None:
    trust = Trust()
    trust.add(comparison(1, 0.7, human=1.0))
    assert trust.summary()["findings"] == ["People decided only one pair, which says nothing about the judge."]


def test_a_judge_that_throws_a_coin_is_exposed() -> None:
    rng = random.Random(3)
    found = judged(lambda a, b: (rng.gauss(0, 2), 0.0), people="quality")
    only(found, "contradicts itself", "coin", "too sure")
    contradictions = found["position"]["contradictions"]
    assert contradictions["low"] < 0.5 < contradictions["high"]
    assert found["calibration"]["accuracy"]["low"] < 0.5 < found["calibration"]["accuracy"]["high"]
    assert found["calibration"]["kappa"]["low"] < 0 < found["calibration"]["kappa"]["high"]


def test_a_judge_that_refuses_a_fifth_is_exposed() -> None:
    def prefer(a: str, b: str) -> tuple[float | None, float | None]:
        number = min(int(text.split()[0].removeprefix("text")) for text in (a, b)) // 2
        return (None, None) if number % 5 == 0 else fair(a, b)

    found = judged(prefer)
    only(found, "abstains")
    assert "no probability for an option" in found["findings"][0]
    abstentions = found["abstentions"]
    assert abstentions["pairs"]["value"] == abstentions["judgements"]["value"] == 0.2
    assert abstentions["pairs"]["n"] == N and abstentions["judgements"]["n"] == 2 * N
    assert abstentions["reasons"] == {"no probability for an option": 2 * N // 5}
    assert [p["abstained"] for p in found["principles"]] == [N // 5, N // 5]
    assert found["ties"]["pairs"]["n"] == N - N // 5  # an abstention is no tie


def test_a_judge_that_prefers_its_own_is_exposed() -> None:
    quality = responses()
    own = {text for i, text in enumerate(quality) if i % 2 == 0}

    def prefer(a: str, b: str) -> tuple[float, float]:
        good, bad = fair(a, b)
        return good + 2 * (a in own), bad + 2 * (b in own)

    found = judged(prefer, people="quality", authors=("judge", "other"))
    only(found, "prefers its own response more often than people do", "too sure")
    own_share = found["self_preference"]
    assert own_share["judge"]["n"] == N and own_share["difference"]["low"] > 0.05
    # by hand: own wins where q_own + 0.5 > q_other; an own that is better always wins, another's in one of four cases
    assert own_share["opportunity_gap"]["value"] == pytest.approx(0.75, abs=0.1)
    assert [row["author"] for row in found["authors"]] == ["judge", "other"]
    assert sum(row["wins"]["value"] for row in found["authors"]) == pytest.approx(1)
    only(judged(prefer, authors=("judge", "other")), "prefers its own response: ")
    found = judged(prefer, authors=("judge", "judge"))  # between its own there is nothing to prefer
    assert found["self_preference"] is None and found["authors"] == []


def test_an_own_response_that_is_better_is_no_self_preference() -> None:
    trust = Trust("judge")
    for i in range(N):
        trust.add(comparison(i, 0.9, human=0.8, authors=("judge", "other")))
    found = trust.summary()
    assert found["self_preference"]["judge"]["value"] == found["self_preference"]["people"]["value"] == 1
    only(found)


def test_a_judge_against_people_is_exposed() -> None:
    found = judged(lambda a, b: tuple(-x for x in fair(a, b)), people="quality")  # type: ignore[arg-type, return-value]
    only(found, "disagrees with people", "too sure")
    assert found["calibration"]["accuracy"]["value"] == 0
    assert found["calibration"]["kappa"]["value"] == pytest.approx(-1, abs=0.01)


# --- principles, checks, ties --------------------------------------------------------------------------------


def comparison(
    i: int, label: float | None, *judgements: Judgement, chosen: str = "x", rejected: str = "y", **more: Any
) -> Comparison:
    return Comparison(
        id=str(i),
        prompt=(user(f"hello {i}"),),
        chosen=(assistant(chosen),),
        rejected=(assistant(rejected),),
        label=label,
        abstained=label is None,
        judgements=judgements,
        **more,
    )


def said(principle: str, p: float, swapped: float | None = None, **more: Any) -> Judgement:
    return Judgement(principle=principle, forward=p, swapped=p if swapped is None else swapped, **more)


def test_agreement_between_principles_is_a_matrix_of_pairs_both_decided() -> None:
    trust = Trust()
    for i in range(N):
        same = 0.9 if i % 4 else 0.2  # agrees with "a" in three of four
        tie_or_not = said("c", 0.5) if i % 2 else said("c", 0.9)
        trust.add(comparison(i, 0.8, said("a", 0.9), said("b", same), tie_or_not, human=1.0))
    found = trust.summary()["agreement"]
    cells = {(cell["a"], cell["b"]): cell for cell in found["cells"]}
    assert list(cells) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert cells["a", "b"]["agree"]["value"] == 0.75 and cells["a", "b"]["agree"]["n"] == N
    assert cells["a", "c"]["agree"]["value"] == 1 and cells["a", "c"]["agree"]["n"] == N // 2
    # which response is the first is thrown by the id, so chance agrees in one of two: kappa = 2 x 0.75 - 1
    assert cells["a", "b"]["kappa"]["value"] == pytest.approx(0.5, abs=0.02)
    assert cells["a", "c"]["kappa"]["value"] == 1
    assert found["mean"]["n"] == 2 * N and found["mean"]["value"] == pytest.approx((300 + 200 + 100) / (2 * N))
    rows = {row["principle"]: row for row in trust.summary()["principles"]}
    assert [rows[p]["agrees_with_people"]["value"] for p in "abc"] == [1, 0.75, 0.75]  # a tie is half right
    assert [rows[p]["ties"] for p in "abc"] == [0, 0, N // 2]
    assert rows["a"]["confidence"]["value"] == pytest.approx(log_odds(0.9))
    assert trust.summary()["ties"]["judgements"]["value"] == pytest.approx(1 / 6)


def test_checks_are_told_apart_and_take_no_part_in_position() -> None:
    trust = Trust()
    for i in range(10):
        trust.add(comparison(i, 0.8, said("model", 0.9, 0.7), said("check", 1.0, 0.0, kind="check")))
    found = trust.summary()
    assert found["position"]["contradictions"]["n"] == 10 and found["position"]["contradictions"]["value"] == 0
    assert found["position"]["bias"]["value"] == pytest.approx((log_odds(0.9) - log_odds(0.7)) / 2)
    assert [(row["principle"], row["kind"]) for row in found["principles"]] == [("check", "check"), ("model", "model")]
    assert found["principles"][0]["confidence"] is None and found["principles"][0]["n"] == 10


def test_a_judge_that_never_decides_is_exposed() -> None:
    trust = Trust()
    for i in range(N):
        trust.add(comparison(i, 0.5, said("p", 0.5)))
    only(trust.summary(), "prefers neither")
    assert trust.summary()["ties"]["contradictory_pairs"] == 0


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0, 1))
def test_naming_the_other_response_chosen_changes_nothing(forward: float, swapped: float, human: float) -> None:
    label = sigmoid((log_odds(forward) + log_odds(swapped)) / 2)
    one, other = Trust("judge"), Trust("judge")
    texts = {"chosen": "a longer text", "rejected": "short"}
    one.add(comparison(1, label, said("p", forward, swapped), human=human, authors=("judge", "other"), **texts))
    texts = {"chosen": "short", "rejected": "a longer text"}
    mirrored = said("p", 1 - swapped, 1 - forward)  # what was shown first stays so: it is now the rejected one
    other.add(comparison(1, 1 - label, mirrored, human=1 - human, authors=("other", "judge"), **texts))
    a, b = one.summary(), other.summary()
    for part in ("length", "self_preference", "authors", "ties", "abstentions"):
        assert a[part] == b[part]
    assert a["position"]["contradictions"] == b["position"]["contradictions"]
    assert a["calibration"]["accuracy"] == b["calibration"]["accuracy"]
    assert a["position"]["bias"]["value"] == pytest.approx(b["position"]["bias"]["value"], abs=1e-6)


# --- memory, intervals, empties ------------------------------------------------------------------------------


def test_memory_does_not_grow_with_pairs() -> None:
    trust, sizes = Trust("judge"), []
    for i in range(4000):
        why = {"abstained": f"answered neither option (they hold {i} of its probability)"} if i % 7 == 0 else {}
        unique = {"abstained": f"reason {i}"} if i % 11 == 0 else {}
        silent = Judgement(principle="q", forward=None, swapped=0.2, **(why or unique))
        trust.add(comparison(i, 0.8, said("p", 0.9), silent, said("r", 0.3), authors=("judge", "other")))
        if i in (999, 3999):
            sizes.append(len(pickle.dumps(trust)))
    assert sizes[1] - sizes[0] < 200  # larger numbers take a few bytes more each
    assert len(trust.reasons) <= REASONS + 1 and trust.reasons["answered neither option"] == 572
    before = len(pickle.dumps(trust))
    for i in range(4000, 5000):
        trust.add(comparison(i, 0.8, human=1.0))
    assert len(pickle.dumps(trust)) - before < 1000 * 20


def test_a_pair_of_sixteen_judgements_counts_as_one_where_they_say_the_same() -> None:
    alone, many, apart = Ratio(), Ratio(), Ratio()
    rng = random.Random(0)
    for _ in range(200):
        one = rng.random() < 0.3
        alone.add(one, 1)
        many.add(16 * one, 16)
        apart.add(sum(rng.random() < 0.3 for _ in range(16)), 16)
    width = {name: r.share().high - r.share().low for name, r in (("alone", alone), ("many", many), ("apart", apart))}
    assert many.share().n == 3200 and many.share().value == alone.share().value
    assert width["many"] == pytest.approx(width["alone"], rel=0.01)
    assert width["apart"] < width["alone"] / 3  # independent: a quarter of the width
    assert many.mean().high - many.mean().low == pytest.approx(width["many"], rel=0.05)


def test_without_pairs_there_is_nothing_to_say() -> None:
    found = Trust("judge").summary()
    only(found)
    assert found["pairs"] == 0 and found["self_preference"] is None and found["calibration"]["n"] == 0
    assert found["position"]["contradictions"] == {
        "value": None, "low": None, "high": None, "n": 0, "clusters": 0,
    }  # fmt: skip


def test_every_interval_holds_its_value_and_is_plain_json() -> None:
    def check(node: Any) -> int:
        if isinstance(node, dict) and {"value", "low", "high", "n"} <= node.keys():
            if node["low"] is not None:
                assert node["low"] <= node["value"] + 1e-12 and node["value"] <= node["high"] + 1e-12
            return 1
        return sum(map(check, node.values() if isinstance(node, dict) else node if isinstance(node, list) else []))

    found = judged(fair, "quality", authors=("judge", "other"), n=30)
    assert check(found) > 30
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    zero = found["position"]["contradictions"]
    assert zero["value"] == zero["low"] == 0 and 0 < zero["high"] < 0.2 and not math.isnan(zero["high"])


# --- in a run and its report ---------------------------------------------------------------------------------


def test_the_held_out_comparisons_carry_what_people_chose(tmp_path: Path) -> None:
    """Whichever side a person's choice is shown on, a judge that knows the quality agrees with the person."""
    quality = responses()
    texts = list(quality)
    heldout = []
    for i in range(60):
        a, b = sorted(texts[2 * i : 2 * i + 2], key=lambda t: -quality[t])
        heldout.append(comparison(i, 1.0, chosen=a, rejected=b, labeler="human"))
    engine: Any = ScriptedEngine(prefer=lambda request: fair(*shown(request)))
    recipe = load_recipe("tiny")

    class Here(Run):
        """A run whose judge is the engine, and that keeps nothing."""

        def engine(self, spec: str) -> Any:
            return nullcontext(engine)

        def records(self, stage: str, items: Any, make: Any, kind: Any, **_: Any) -> Any:
            return list(make(items))

    run = Here(recipe, tmp_path)
    run.put(DATA, SimpleNamespace(heldout_comparisons=heldout, comparisons=[]))
    run.put(JUDGE, "judge")

    def judged_heldout() -> list[Comparison]:
        JudgeHeldout().run(run)
        return run.get(HELDOUT_JUDGED)

    judged_pairs = judged_heldout()
    assert all(c.human == 1.0 for c in judged_pairs)
    assert trust_in(judged_pairs, "judge")["calibration"]["accuracy"]["value"] == 1
    engine.prefer = lambda request: (1.0, 0.0)  # the first place: it must not gain by the side people's choice is on
    found = trust_in(judged_heldout(), "judge")
    assert found["calibration"]["accuracy"]["value"] == 0.5


def report() -> dict[str, Any]:
    """What a report has of a judge with faults, on labels without people and on held-out pairs with them."""

    def prefer(a: str, b: str) -> tuple[float, float]:
        return len(a) / 100, len(b) / 100

    held_out = judged(prefer, "quality", authors=("judge", "other"))
    return {"trust": {"labels": judged(prefer), "heldout": held_out}}


def test_the_report_says_what_was_found() -> None:
    data = report()
    markdown, html = render_markdown(data), render_html(data)
    for page in (markdown, html):
        assert "Can the judge be trusted?" in page
        assert "Labels of this run: The judge prefers the longer response" in page
        assert "Held-out human comparisons: The judge cannot be told from a coin" in page
        assert "100.0 % [99.0, 100.0], n = " in page  # the longer response, with Wilson's interval
        for title in (
            "Judge against people",
            "Reliability",
            "Judge by principle",
            "Agreement between principles",
            "Wins by author",
        ):
            assert f"{title}: held-out human comparisons" in page
        assert "Judge against people: labels of this run" not in page  # no person labelled these
    assert markdown.index("Can the judge be trusted?") < markdown.index("## PPO")
    fair_report = render_markdown({"trust": {"labels": judged(fair)}})
    assert "None of the faults that are looked for was found" in fair_report


def test_an_older_report_is_rendered_as_it_was() -> None:
    old = {"judge": {"accuracy": {"value": 0.875, "low": 0.8, "high": 0.95, "n": 80}, "abstained": 0}}
    for page in (render_markdown(old), render_html(old)):
        assert "87.5 % [80.0, 95.0], n = 80" in page and "Can the judge be trusted?" not in page
    for data in ({}, {"trust": None}, {"trust": {}}, {"trust": {"labels": None}}):
        for page in (render_markdown(data), render_html(data)):
            assert "trusted" not in page and "svg" not in page.replace("svg {", "").replace("svg.plot {", "")
    render_markdown({"trust": {"labels": {"pairs": 3}}})  # a part of a summary is no error


def test_names_in_the_report_are_never_markup() -> None:
    bad = "<script>x</script> | [a](javascript:b)"
    data = json.loads(json.dumps(report()).replace('"kind"', json.dumps(bad)).replace('"other"', json.dumps(bad)))
    data["trust"]["labels"]["findings"] = [bad]
    data["trust"]["labels"]["abstentions"]["reasons"] = {bad: 1}
    html, markdown = render_html(data), render_markdown(data)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "<script" not in markdown and "](javascript" not in markdown


def test_plots_are_the_same_bytes_again_and_ask_for_nothing() -> None:
    bins = report()["trust"]["heldout"]["calibration"]["bins"]
    plot = reliability(bins, "one")
    assert plot == reliability(bins, "one")
    assert not re.search(r"<script|https?:|url\(|<image|<style|@import| on\w+=|20\d\d-", plot)
    assert "<title" in plot and f"of {bins[0]['right']['n']}" in re.search(r"<desc.*?</desc>", plot)[0]  # type: ignore[index]
    assert "currentColor" in plot and "#000000" not in plot and "#010203" not in plot  # legible in light and dark
    ids = re.findall(r' id="([^"]*)"', plot + reliability(bins, "two"))
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'xlink:href="#([^"]*)"', plot))
    assert used and used <= set(ids)
