"""`solon label` and `solon feedback-model`: files in, files out, and what they say of the judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from solon.cli import app
from solon.constitution import load_constitution
from solon.data import read_comparisons
from solon.data.heldout import split_by_prompt
from solon.engines import ScoreRequest, ScriptedEngine
from solon.errors import InputError
from solon.feedback.judge import ModelJudge
from solon.feedback.settings import JudgeSettings
from solon.records import text_of
from tests.asking import label

RULES = load_constitution("simple")


def fair() -> ScriptedEngine:
    def prefer(request: ScoreRequest) -> tuple[float, float]:
        assert request.question is not None
        a, b = (text.count("good") for text in request.question.criteria)
        return float(a - b), 0.0

    return ScriptedEngine(prefer=prefer)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_and_more_than_pairs_go_through_together(tmp_path: Path) -> None:
    pairs = write(
        tmp_path / "in.jsonl",
        [
            {"id": "two", "prompt": "p", "responses": ["good", "bad"]},
            {"id": "three", "prompt": "p", "responses": ["bad", "good", "good good"]},
            {"prompt": "q", "chosen": "bad", "rejected": "good"},
        ],
    )
    out = tmp_path / "out.jsonl"
    result = label(pairs, out, ModelJudge(fair(), RULES, JudgeSettings(principles_per_pair=None)))
    made = {r["id"]: r for r in lines(out)}
    assert result["records"] == len(made) == 1 + 3 + 1
    assert made["two"]["chosen"][0]["content"] == "good"
    assert made["three/0-2"]["chosen"][0]["content"] == "good good" and made["three/0-2"]["label"] > 0.8
    [human] = [r for r in made.values() if "human" in r]
    assert human["human"] == 0.0  # people chose "bad", the judge "good"
    assert json.loads(Path(result["trust"]).read_text())["pairs"] == 5


def test_a_killed_labelling_goes_on_and_its_trust_counts_every_pair(tmp_path: Path) -> None:
    rows = [{"id": str(n), "prompt": f"p{n}", "responses": ["good" * (n % 3), "bad"]} for n in range(150)]
    pairs = write(tmp_path / "in.jsonl", rows)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = label(pairs, whole, ModelJudge(fair(), RULES, JudgeSettings()))
    text = whole.read_bytes()
    for at in (0, 1, len(text) // 2, len(text) - 1):
        cut.write_bytes(text[:at])
        found = label(pairs, cut, ModelJudge(fair(), RULES, JudgeSettings()))
        assert sorted(cut.read_bytes().splitlines()) == sorted(text.splitlines())
        assert found["summary"] == expected["summary"]


def test_a_wrong_line_is_told_before_anything_is_judged(tmp_path: Path) -> None:
    rows: list[dict] = [{"prompt": f"p{n}", "responses": ["a", "b"]} for n in range(99)]
    pairs = write(tmp_path / "in.jsonl", [*rows, {"prompt": "p", "responses": ["only one"]}])
    asked: list[int] = []
    engine = ScriptedEngine(prefer=lambda r: asked.append(1) or (0.0, 0.0))
    with pytest.raises(InputError, match=r"in\.jsonl:100: .*two or more"):
        label(pairs, tmp_path / "out.jsonl", ModelJudge(engine, RULES, JudgeSettings()))
    with pytest.raises(InputError, match="stands twice"):
        label(
            write(tmp_path / "in.jsonl", [{"id": "x", **row} for row in rows[:2]]),
            tmp_path / "out.jsonl",
            ModelJudge(engine, RULES),
        )
    assert not asked


def test_the_verb_takes_every_way_of_judging(tiny: str, tmp_path: Path) -> None:
    pairs = write(tmp_path / "in.jsonl", [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no no"} for n in range(3)])
    base = ["label", "--pairs", pairs, "--model", tiny, "--constitution", "simple", "--quiet", "--json"]
    for n, more in enumerate(
        (
            [],
            ["--hard"],
            ["--together"],
            ["--rationales", "2"],
            ["--examples", "solon:comparisons-harmless", "--few-shot", "2"],
        )
    ):
        out = tmp_path / f"{n}.jsonl"
        done = CliRunner().invoke(app, [*base, *more, "--out", str(out)])
        assert done.exit_code == 0, done.output
        made = lines(out)
        assert len(made) == 3
        if "--together" in more:
            assert all(len(r["judgements"]) == 1 and "+" in r["judgements"][0]["principle"] for r in made)
        if "--hard" in more:
            assert all(r["label"] in (0.5, 1.0, None) for r in made)
        if "--rationales" in more:
            for r in made:
                for j in r["judgements"]:
                    assert j.get("abstained") or (j["rationale"] and 0.4 <= j["forward"] <= 0.6)
    done = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "x.jsonl"), "--clamp", "0.6", "0.9"])
    assert done.exit_code == 2


def test_no_prompt_stands_on_both_sides_of_the_split() -> None:
    found = read_comparisons("solon:comparisons-harmless")
    doubled = found + [c.model_copy(update={"id": c.id + "-again"}) for c in found]
    training, kept = split_by_prompt(doubled, 0.2, seed=1)
    assert len(training) + len(kept) == len(doubled) and abs(len(kept) - 0.2 * len(doubled)) <= 2
    assert not {c.prompt for c in training} & {c.prompt for c in kept}
    assert split_by_prompt(doubled, 0.2, seed=1) == (training, kept) != split_by_prompt(doubled, 0.2, seed=2)


def test_the_feedback_model_verb_measures_on_what_it_did_not_see(tiny: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["feedback-model", "--comparisons", "solon:comparisons-harmless", "--limit", "20", "--model", tiny,
              "--out", str(tmp_path / "judge"), "--quiet", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["comparisons"] == 16 and result["heldout"]["calibration"]["accuracy"]["n"] == 4


def test_the_loss_asks_that_the_two_orders_agree(tiny: str, tmp_path: Path) -> None:
    """A judge that names the option shown first, whatever it says, has equal log-odds in both orders."""
    from solon.engines.local import LocalEngine
    from solon.feedback.feedback_model import train_feedback_model
    from solon.feedback.questions import HHH, OPTIONS, PREFIX, comparison_chat
    from solon.feedback.settings import FeedbackTrainSettings

    found = [c for c in read_comparisons("solon:comparisons-harmless")[:40] if c.label is not None]

    def bias(agreement: float) -> float:
        """Mean size of the log-odds that belong to the position."""
        settings = FeedbackTrainSettings(epochs=2, batch_size=8, learning_rate=5e-3, agreement=agreement)
        out = tmp_path / f"judge-{agreement}"
        common: dict[str, Any] = {"adapter": None, "system": None, "dtype": "float32"}
        train_feedback_model(found, RULES, tiny, out, question=HHH, settings=settings, **common)
        sides = [(text_of(c.chosen), text_of(c.rejected)) for c in found]
        chats = [
            comparison_chat(c.prompt, *order, HHH)
            for c, (a, b) in zip(found, sides, strict=True)
            for order in ((a, b), (b, a))
        ]
        engine = LocalEngine.load(str(out), dtype="float32", system=None)
        given = engine.score(ScoreRequest(str(i), chat, OPTIONS, PREFIX) for i, chat in enumerate(chats))
        odds = {int(s.id): s.logprobs[0] - s.logprobs[1] for s in given}  # type: ignore[operator]
        return sum(abs(odds[i] + odds[i + 1]) / 2 for i in range(0, len(chats), 2)) / len(found)

    assert bias(10.0) < 0.5 * bias(0.0)


def test_a_warmed_up_judge_answers_with_the_options(tiny: str, tmp_path: Path) -> None:
    """Random weights give the two letters hardly any probability; trained on their log-odds alone, they still would."""
    from solon.engines.local import LocalEngine
    from solon.feedback.feedback_model import train_feedback_model
    from solon.feedback.labels import as_pairs
    from solon.feedback.questions import HHH, OPTIONS, PREFIX, comparison_chat
    from solon.feedback.settings import FeedbackTrainSettings
    from tests.asking import compare

    found = [c for c in read_comparisons("solon:comparisons-harmless")[:40] if c.label is not None]
    settings = FeedbackTrainSettings(epochs=6, batch_size=8, learning_rate=5e-3)
    train_feedback_model(
        found,
        RULES,
        tiny,
        tmp_path / "judge",
        question=HHH,
        settings=settings,
        adapter=None,
        system=None,
        dtype="float32",
    )

    def held(model: str) -> float:
        engine = LocalEngine.load(model, dtype="float32", system=None)
        pairs = as_pairs(found, 0)
        requests = [ScoreRequest(p.id, comparison_chat(p.prompt, *p.responses, HHH), OPTIONS, PREFIX) for p in pairs]
        return min(sum(math.exp(x) for x in s.logprobs if x is not None) for s in engine.score(requests))

    assert held(tiny) < 0.05 and held(str(tmp_path / "judge")) > 0.5
    engine = LocalEngine.load(str(tmp_path / "judge"), dtype="float32", system=None)
    assert not any(c.abstained for c in compare(as_pairs(found, 0), engine, RULES))
