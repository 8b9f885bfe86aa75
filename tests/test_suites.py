"""A judge beside answers that need none; the reference files are read as what they are."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from solon.analysis.suites import FIRST, LONGER, Item, measure, read_items
from solon.cli import app
from solon.constitution import Constitution
from solon.engines import ScoreRequest, ScriptedEngine
from solon.errors import InputError
from solon.feedback.judge import ModelJudge
from solon.feedback.questions import HHH
from solon.feedback.settings import JudgeSettings
from solon.records import Pair, user

RULES = Constitution.from_question(HHH)


def asked(engine: ScriptedEngine, rules: Constitution) -> ModelJudge:
    return ModelJudge(engine, rules, JudgeSettings(principles_per_pair=None))


def items(n: int = 120) -> list[Item]:
    """The good response is longer in 60 of 120, and shown first in 60."""
    made = []
    for i in range(n):
        good, bad = ("good " * 3, "bad") if i % 2 else ("good", "bad " * 5)
        first = i % 4 < 2
        pair = Pair(
            id=str(i), prompt=(user(f"q{i}"),), responses=(good, bad) if first else (bad, good), human=float(first)
        )
        made.append(Item(pair, text=f"Options:\n (A) {pair.responses[0]}\n (B) {pair.responses[1]}"))
    return made


def by(goodness: object) -> ScriptedEngine:
    def prefer(request: ScoreRequest) -> tuple[float, float]:
        assert request.question is not None
        if isinstance(request.question.state, str):  # the file's own words
            a, b = request.chat[-1].content.split("(A) ")[1].split("\n (B) ")
        else:
            a, b = request.question.criteria
        return goodness(a) - goodness(b), 0.0  # type: ignore[operator]

    return ScriptedEngine(prefer=prefer)


def test_a_judge_that_knows_is_informative_however_it_is_asked() -> None:
    result = measure(items(), asked(by(lambda text: 2.0 * text.startswith("good")), RULES))
    assert result["accuracy"]["judge"]["value"] == 1 and result["verdict"].startswith("informative")
    assert result["accuracy"]["as the file asks it, (A) first"]["value"] == 1
    assert result["accuracy"][FIRST]["value"] == result["accuracy"][LONGER]["value"] == 0.5


@pytest.mark.parametrize("goodness", [len, lambda text: 0.0, lambda text: -len(text)])
def test_a_judge_that_knows_nothing_is_called_uninformative(goodness: object) -> None:
    result = measure(items(), asked(by(goodness), RULES))
    assert result["verdict"].startswith(
        "uninformative: right in 50.0% [41.2%, 58.8%], n = 120; it was not shown to beat"
    )


def test_pointwise_and_pairwise_agree_about_a_judge_that_knows() -> None:
    def prefer(request: ScoreRequest) -> tuple[float, ...]:
        assert request.question is not None
        best = 8 if request.question.state["response"].startswith("good") else 3
        return tuple(-1.0 - abs(n - best) for n in range(1, 11))

    result = measure(items(20), asked(ScriptedEngine(prefer=prefer), RULES), pointwise=True)
    assert result["accuracy"]["judge"]["value"] == 1 and result["trust"] is None


def test_the_paper_s_file_gives_the_figures_of_its_trivial_answers(reference_data: Path) -> None:
    found = read_items(str(reference_data / "hhh-dev.jsonl.gz"))
    result = measure(found, asked(by(lambda text: 0.0), RULES))
    # 200 of the paper's 438, some twice; on all of them 52.1 % and 56.2 %, from which this is one standard error
    assert result["accuracy"][FIRST]["value"] == pytest.approx(0.521, abs=0.07)
    assert result["accuracy"][LONGER]["value"] == pytest.approx(0.562, abs=0.07)
    for item in found:
        a, b = item.pair.responses
        assert item.text is not None
        shown_a, shown_b = (item.text.index(f"({x}) [[[") for x in "AB")
        assert item.text.index(a[:40], shown_a) < shown_b < item.text.index(b[:40], shown_b)


def test_compared_pairs_do_not_all_lie_with_the_better_first(reference_data: Path) -> None:
    found = read_items(str(reference_data / "hh-harmless-dev.jsonl.gz"))
    assert 0.45 < sum(i.pair.human or 0 for i in found) / len(found) < 0.55


def test_a_file_that_is_neither_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "p", "corrects": [" (C)"], "text_correct": "x", "text_incorrect": "y"}))
    with pytest.raises(InputError, match=r"x\.jsonl:1: "):
        read_items(str(path))


def test_a_file_of_ties_alone_says_so(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": 0.5}
    (tmp_path / "ties.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="none of its 1 comparisons prefers a side"):
        read_items(str(tmp_path / "ties.jsonl"))


def test_the_verb_prints_the_table_and_the_verdict(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "yes indeed", "rejected": "no"} for n in range(8)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "result.json"
    done = CliRunner().invoke(
        app, ["evaluate", "--suite", "hhh", "--file", str(path), "--model", tiny, "--out", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert "always the longer" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["n"] == json.loads(out.read_text())["n"] == 8
    done = CliRunner().invoke(app, ["evaluate", "--suite", "attacks", "--model", tiny, "--limit", "4"])
    assert done.exit_code == 0 and "beyond it" in done.stdout
    for wrong in (["hhh"], ["attacks", "--broken"], ["hhh", "--file", str(path), "--broken", "--pointwise"]):
        assert CliRunner().invoke(app, ["evaluate", "--model", tiny, "--suite", *wrong]).exit_code == 2


@pytest.mark.parametrize("pointwise", [True, False])
def test_a_judge_that_answers_nothing_gets_no_verdict_and_one_that_abstains_is_told(pointwise: bool) -> None:
    def silent(request: ScoreRequest) -> tuple[None, ...]:
        return (None,) * len(request.continuations)

    with pytest.raises(InputError, match="answered none of 120 questions"):
        measure(items(), asked(ScriptedEngine(prefer=silent), RULES), pointwise=pointwise)

    def often(request: ScoreRequest) -> tuple[float | None, ...]:
        said = request.question.state if request.question is not None else {}
        asked = said if isinstance(said, str) else said["conversation"][0]["content"]
        return silent(request) if asked == "q7" else (-2.0,) * len(request.continuations)

    result = measure(items(), asked(ScriptedEngine(prefer=often), RULES), pointwise=pointwise)
    assert result["abstained"] == 1 and result["verdict"].endswith("it abstained in 1 of them")


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    """Each question five times with other words in the responses: right or wrong together, and worth one."""
    rng = random.Random(0)
    right = [rng.random() < 0.7 for _ in range(40)]

    def items(times: int) -> list[Item]:
        return [
            Item(Pair(id=f"{q}/{n}", prompt=(user(f"q{q}"),), responses=(f"good {n}", f"bad {n}"), human=1.0))
            for q in range(40)
            for n in range(times)
        ]

    def prefer(request: ScoreRequest) -> tuple[float, float]:
        assert request.question is not None
        q = int(re.search(r"> q(\d+)", request.chat[-1].content)[1])  # type: ignore[index]
        sign = 1 if right[q] else -1
        return tuple(sign * float(text.startswith("good")) for text in request.question.criteria)  # type: ignore[return-value]

    rules = Constitution.from_question("Which?")
    one, five = (measure(items(times), asked(ScriptedEngine(prefer=prefer), rules)) for times in (1, 5))
    widths = [found["accuracy"]["judge"]["high"] - found["accuracy"]["judge"]["low"] for found in (one, five)]
    assert widths[1] > 0.95 * widths[0] and five["accuracy"]["judge"]["clusters"] == five["prompts"] == 40
    assert five["trust"]["calibration"]["accuracy"]["clusters"] == 40
