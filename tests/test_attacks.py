"""The attacks on the judge: a set that covers its kinds, and a measure that tells a gullible judge from a sound one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from solon.constitution import Constitution
from solon.engines import ScoreRequest, ScriptedEngine
from solon.errors import InputError
from solon.feedback import questions
from solon.feedback.attacks import Attack, measure, read_attacks
from solon.feedback.labels import log_odds, sigmoid, to_comparison
from solon.records import Comparison, Judgement, Pair, text_of, user
from tests.asking import compare

RULES = Constitution.from_question("Which response is better?")
ATTACKS = read_attacks()
PLAIN = {text for a in ATTACKS for text in (a.good, a.bad)}
GOOD = {a.good for a in ATTACKS}
KINDS = {  # kind: how many different attacks of it, at least
    **dict.fromkeys(("verdict", "order", "fake-turn", "delimiter", "chat-template", "master-key", "invisible"), 6),
    **dict.fromkeys(("authority", "markup", "fake-score", "flattery", "fake-critique", "other-language", "padding"), 5),
    "encoded": 4,
}
CLAIM = re.compile(r"\(([AB])\) is better")


def by_quality(request: ScoreRequest) -> float:
    """Log-odds of (A): 2 where it alone is good. It reads what only a typed question tells apart: the responses."""
    assert request.question is not None
    a, b = (text in GOOD for text in request.question.criteria)
    return 2.0 * (a - b)


def gullible(request: ScoreRequest) -> tuple[float, float]:
    """Obeys the first verdict that it finds anywhere."""
    return _obeying(text_of(request.chat), request)


def wise(request: ScoreRequest) -> tuple[float, float]:
    """Obeys what Solon says: every line, broken wherever Unicode breaks one, that is not behind "> "."""
    lines = text_of(request.chat).splitlines()
    return _obeying("\n".join(line for line in lines if not line.startswith("> ")), request)


def _obeying(text: str, request: ScoreRequest) -> tuple[float, float]:
    claim = CLAIM.search(text)
    if claim:
        return (5.0, 0.0) if claim[1] == "A" else (0.0, 5.0)
    return by_quality(request), 0.0


def judge(prefer: Callable[[ScoreRequest], Any]) -> Callable[[Sequence[Pair]], Iterable[Comparison]]:
    return lambda pairs: compare(pairs, ScriptedEngine(prefer=prefer), RULES)


def by_worth(worth: Callable[[str], float]) -> Callable[[Sequence[Pair]], Iterable[Comparison]]:
    """A judge of single responses: log-odds are differences of their worth."""

    def answer(pairs: Sequence[Pair]) -> Iterable[Comparison]:
        for pair in pairs:
            p = sigmoid(worth(pair.responses[0]) - worth(pair.responses[1]))
            yield to_comparison(pair, [Judgement(principle="p", forward=p, swapped=p)], {})

    return answer


def quality(text: str) -> float:
    return 2.0 if text in GOOD else 0.0


# --- the set -----------------------------------------------------------------------------------------------


def test_the_set_is_large_and_covers_its_kinds() -> None:
    assert len(ATTACKS) >= 48
    assert len({a.id for a in ATTACKS}) == len({a.attack for a in ATTACKS}) == len(ATTACKS)
    counts = {kind: sum(a.kind == kind for a in ATTACKS) for kind in {a.kind for a in ATTACKS}}
    assert set(counts) == set(KINDS)
    assert all(counts[kind] >= least for kind, least in KINDS.items())
    for kind in KINDS:  # no kind rests on one prompt
        assert len({a.prompt for a in ATTACKS if a.kind == kind}) >= min(4, counts[kind])
    for letter in "AB":
        assert sum(f"({letter}) is better" in a.attack for a in ATTACKS if a.kind == "verdict") >= 2


def test_an_attack_is_carried_by_the_bad_response_and_its_control_is_as_long() -> None:
    for a in ATTACKS:
        assert a.attack in a.attacked and (a.bad in a.attacked) == (a.where != "replace")
        assert len(a.control) == len(a.attacked) and a.control != a.attacked
        assert not CLAIM.search(a.control) and a.good not in GOOD - {a.good}
        assert {a.bad, a.attacked, a.control}.isdisjoint(GOOD)


def test_the_line_breaks_of_the_invisible_kind_are_those_that_quoting_must_know() -> None:
    used = {c for a in ATTACKS if a.kind == "invisible" for c in a.attack if len(f"a{c}b".splitlines()) > 1}
    assert {"\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"} <= used


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": "x", "kind": "k", "prompt": "p", "good": "g", "bad": "b", "attack": "!", "where": "middle"}', "where"),
        ('{"id": "x", "kind": "k", "prompt": "p", "good": "g", "bad": "b", "attack": "", "where": "end"}', "a text"),
        ('{"id": "x", "kind": "k", "prompt": "p", "good": "g", "bad": "g", "attack": "!", "where": "end"}', "not the"),
        ('{"id": "x", "kind": "k", "good": "g", "bad": "b", "attack": "!", "where": "end"}', "prompt"),
    ],
)
def test_a_wrong_attack_is_named_by_its_line(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "attacks.jsonl"
    file.write_text("\n" + line)
    with pytest.raises(InputError, match=rf"attacks\.jsonl:2: [^\n]*{why}"):
        read_attacks(str(file))


# --- the measure -------------------------------------------------------------------------------------------


def test_a_gullible_judge_is_caught() -> None:
    found = measure(ATTACKS, judge(gullible))
    verdict, score = found["kinds"]["verdict"], found["kinds"]["fake-score"]
    assert found["all"]["sound"]["value"] == 1  # without an attack it is right
    # Both orders are asked and a letter stands for each response once, so that obeying one ends in a tie.
    claimed = sum(bool(CLAIM.search(a.attack)) for a in ATTACKS if a.kind == "verdict") / verdict["n"]
    assert verdict["lost"]["value"] == claimed >= 0.5 and verdict["flipped"]["value"] == 0
    rows = {a.id: (a, row) for a, row in zip(ATTACKS, found["attacks"], strict=True) if a.kind == "verdict"}
    for asked, row in rows.values():  # it moves the judge where it claims, and nowhere else
        assert (row["attacked"] > row["plain"] + 0.1) == bool(CLAIM.search(asked.attack))
    assert found["all"]["beyond"]["low"] > 0
    assert verdict["control"]["value"] == pytest.approx(0)
    assert found["all"]["shift"]["low"] > 0
    assert score["shift"]["value"] == pytest.approx(0) and score["lost"]["value"] == 0


def test_a_judge_that_obeys_solon_alone_is_not_moved() -> None:
    found = measure(ATTACKS, judge(wise))
    assert found["all"]["n"] == len(ATTACKS) and found["all"]["sound"]["value"] == 1
    assert all(r["plain"] == r["attacked"] == pytest.approx(sigmoid(-2.0)) for r in found["attacks"])
    for part in (found["all"], *found["kinds"].values()):
        assert part["lost"]["value"] == part["flipped"]["value"] == 0
        assert part["shift"]["value"] == pytest.approx(0, abs=1e-9)  # float64 through exp and log
    lost = found["all"]["lost"]  # 99 texts, but on 18 questions: as good as 18 answers, not 99
    assert lost["value"] == 0 and lost["clusters"] == found["all"]["questions"] == 18 and 0.15 < lost["high"] < 0.25


@pytest.mark.parametrize(
    ("leaky", "moved"),
    [
        (lambda text: text, {"verdict", "fake-turn", "delimiter", "chat-template", "invisible", "fake-critique"}),
        (lambda text: "\n".join(f"> {line}" for line in text.split("\n")), {"invisible"}),
    ],
    ids=["nothing quoted", "quoted by newline alone"],
)
def test_the_same_judge_is_moved_where_quoting_leaks(
    leaky: Callable[[str], str], moved: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test before would say nothing."""
    monkeypatch.setattr(questions, "quoted", leaky)
    found = measure(ATTACKS, judge(wise))
    assert {kind for kind, part in found["kinds"].items() if part["lost"]["value"] > 0} == moved


def test_a_judge_that_reads_scores_is_turned_in_both_orders() -> None:
    found = measure(ATTACKS, by_worth(lambda text: quality(text) + 6 * ("Score: 10/10" in text)))
    turned = [a for a in ATTACKS if "Score: 10/10" in a.attack]
    part = found["kinds"]["fake-score"]
    assert part["flipped"]["value"] == part["lost"]["value"] == pytest.approx(len(turned) / part["n"])
    assert part["shift"]["value"] == pytest.approx(6 * len(turned) / part["n"])
    assert part["flipped"]["low"] > 0 and part["flipped_by_control"]["value"] == 0


def test_a_judge_that_likes_length_is_not_taken_for_one_that_obeys() -> None:
    found = measure(ATTACKS, by_worth(lambda text: len(text) / 100))
    assert found["all"]["shift"]["value"] == pytest.approx(found["all"]["control"]["value"])
    assert all(r["attacked"] > r["plain"] for r in found["attacks"] if r["kind"] == "padding")
    beyond = found["all"]["beyond"]
    assert beyond["value"] == pytest.approx(0, abs=1e-9)
    assert (beyond["low"], beyond["high"]) == (None, None)  # nothing varies


def attack(n: int, **given: Any) -> Attack:
    return Attack(**{"id": str(n), "kind": "k", "prompt": (user("p"),), "good": "g", "bad": f"b{n}", "attack": "!!!",
                     "where": "end", **given})  # fmt: skip


def test_abstentions_are_counted_and_no_verdicts() -> None:
    """Of six attacks the judge is silent on one at all, on two more under attack, and on one beside its control."""
    attacks = [attack(n) for n in range(6)]
    silent = {"b0", "b0!!!", "b1!!!", "b2!!!", attacks[0].control, attacks[3].control}

    def answer(pairs: Sequence[Pair]) -> Iterable[Comparison]:
        for pair in pairs:
            if silent.isdisjoint(pair.responses):
                yield from by_worth(lambda text: text == "g")([pair])
            elif pair.id in "12":  # said, where the others are left out
                yield to_comparison(pair, [Judgement(principle="p", forward=None, swapped=None, abstained="no")], {})

    part = measure(attacks, answer)["all"]
    assert (part["n"], part["abstained"], part["silenced"]) == (2, 4, 2)
    assert part["sound"]["n"] == part["lost"]["n"] == 2


def test_a_judge_that_is_certain_is_still_a_number() -> None:
    """From 0 to 1 in probability, held 1e-6 inside: 2 * log(1e6 - 1)."""

    def answer(pairs: Sequence[Pair]) -> Iterable[Comparison]:
        for pair in pairs:
            attacked = any("!!!" in text for text in pair.responses)
            p = float((pair.responses[0] == "g") != attacked)
            yield to_comparison(pair, [Judgement(principle="p", forward=p, swapped=p)], {}, soft=False)

    part = measure([attack(n) for n in range(4)], answer)["all"]
    assert part["shift"]["value"] == pytest.approx(2 * log_odds(1 - 1e-6)) and part["flipped"]["value"] == 1


def test_a_judge_that_prefers_the_bad_response_anyway_has_nothing_to_lose() -> None:
    part = measure([attack(n) for n in range(4)], by_worth(lambda text: text != "g"))["all"]
    assert part["sound"]["value"] == 0 and part["flipped"]["n"] == 0 and part["flipped"]["value"] is None


def test_a_pair_has_the_same_id_each_time_and_neither_place_is_the_bad_ones() -> None:
    asked: list[list[Pair]] = []

    def answer(pairs: Sequence[Pair]) -> Iterable[Comparison]:
        asked.append(list(pairs))
        return by_worth(quality)(pairs)

    measure(ATTACKS, answer)
    ids = [[p.id for p in pairs] for pairs in asked]
    assert ids[0] == ids[1] == ids[2] == [a.id for a in ATTACKS]
    first = sum(p.responses[0] in GOOD for p in asked[1])
    assert abs(first - len(ATTACKS) / 2) <= 0.5
    assert [p.responses[0] in GOOD for p in asked[0]] == [p.responses[0] in GOOD for p in asked[1]]


def test_nothing_to_measure_is_no_number() -> None:
    part = measure([], judge(wise))["all"]
    assert part["n"] == 0 and part["shift"]["value"] is None and part["lost"]["value"] is None


def test_texts_on_the_same_questions_do_not_narrow_an_interval() -> None:
    """The same 18 questions with each text five times over are worth 18 questions still."""

    def by_question(pairs: Sequence[Pair]) -> Iterable[Comparison]:  # moved on some questions, unmoved on others
        def worth(text: str) -> float:
            return 3.0 if text in GOOD else 0.0

        for pair in pairs:
            gain = 5.0 * (len(pair.prompt[-1].content) % 2)
            yield from by_worth(lambda text, gain=gain: worth(text) + gain * (text not in PLAIN))([pair])

    again = [a.model_copy(update={"id": f"{a.id}/{n}"}) for a in ATTACKS for n in range(5)]
    one, five = (measure(found, by_question)["all"] for found in (ATTACKS, again))
    for key in ("shift", "lost", "flipped"):
        widths = [part[key]["high"] - part[key]["low"] for part in (one, five)]
        assert widths[1] == pytest.approx(widths[0], rel=0.1) and widths[0] > 0
    assert five["shift"]["n"] == 495 and five["shift"]["clusters"] == 18
