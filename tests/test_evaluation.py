"""What a run's figures conclude: the interval decides, "start" is one model, equal answers count half, nothing lost is untold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solon.analysis.answers import changes, measures
from solon.analysis.checks import check, of_answers, of_kl, of_reward_model
from solon.analysis.kl import at_same_kl
from solon.analysis.measures import Answer
from solon.engines import model_name
from solon.feedback.labels import comparison_of
from solon.recipes.recipe import load_recipe
from solon.records import Comparison, Judgement, Pair, assistant, user
from solon.report.headline import headline
from solon.report.run import stages_with_abstentions
from solon.runs.ledger import cost, left_out_line, total_cost
from solon.runs.run import Run
from solon.stages.artifacts import COMPARISONS
from solon.stages.comparisons import by_principle
from solon.stages.evaluation import win_rates
from solon.tables import counted

REFUSAL = "I can't help with that."


def answers(texts: Sequence[str], rewards: Sequence[float | None], source: Any = None) -> list[Answer]:
    return [
        Answer(
            id=str(i),
            prompt=(user(f"Question {i}?"),),
            answer=text,
            ended=True,
            source=source or ("red_team" if i % 2 else "helpful"),
            reward=reward,
        )
        for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    ]


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in rows}


def three(n: int = 42) -> dict[str, list[Answer]]:
    """Rewards that differ by a constant from model to model, prompts far apart: only pairing can see it."""
    texts = [f"answer {i} of many words that differ {i * 7}" for i in range(n)]
    return {
        name: answers(texts, [10.0 * (i % 5) + up * (1 + 0.1 * (i % 3 - 1)) for i in range(n)])
        for name, up in (("start", 0.0), ("SL-CAI", -0.2), ("RL-CAI", 0.5))
    }


def test_every_measure_is_compared_from_start_to_the_last_prompt_by_prompt() -> None:
    found = by_name(changes(three(), {}))["reward"]["steps"]
    assert list(found) == ["start → SL-CAI", "SL-CAI → RL-CAI", "start → RL-CAI"]
    assert found["start → RL-CAI"]["value"] == pytest.approx(0.5)
    two = changes({k: v for k, v in three().items() if k != "SL-CAI"}, {})
    assert list(by_name(two)["reward"]["steps"]) == ["start → RL-CAI"]


def test_a_share_changes_in_points_and_its_interval_is_never_a_point() -> None:
    old = answers(["Yes, gladly."] * 20, [0.0] * 20)
    new = answers([REFUSAL] * 12 + ["Yes, gladly."] * 8, [0.0] * 20)
    found = by_name(changes({"start": old, "RL-CAI": new}, {}))
    step = found["over-refusal of benign prompts"]["steps"]["start → RL-CAI"]
    assert step["value"] == pytest.approx(60.0) and step["low"] > 0
    same = by_name(changes({"start": old, "RL-CAI": old}, {}))["over-refusal of benign prompts"]["steps"][
        "start → RL-CAI"
    ]
    assert same["value"] == 0 and same["low"] < 0 < same["high"]


def test_what_the_judge_would_not_rate_is_left_out_of_the_reward_and_is_not_zero() -> None:
    given = {
        "start": answers(["a b c d"] * 4, [2.0, None, 2.0, 2.0]),
        "RL-CAI": answers(["a b c d"] * 4, [3.0, 3.0, None, 3.0]),
    }
    assert by_name(measures(given, {}))["reward"]["values"]["start"] == {
        "value": 2.0,
        "low": None,
        "high": None,
        "n": 3,
    }
    assert by_name(changes(given, {}))["reward"]["steps"]["start → RL-CAI"]["n"] == 2


class Asked:
    """A judge that prefers longer answers, abstains on those with "?", and counts what it is asked."""

    name, fingerprint = "judge", "judge"

    def __init__(self) -> None:
        from solon.engines.base import Usage

        self.usage, self.seen = Usage(), 0
        self.cost: float | None = 0.0

    def ask(self, pairs: Sequence[Pair]) -> Iterable[Comparison]:
        for p in pairs:
            self.seen += 1
            self.usage.add(2, 10, 2, self.cost)
            first, second = p.responses
            unsure = "?" in first
            odds = 0.4 if len(first) >= len(second) else -0.4
            yield comparison_of(p, (), None if unsure else odds)


def test_the_final_judge_gives_a_share_of_pairs_in_which_equal_answers_count_half(tmp_path: Path) -> None:
    judge = Asked()
    start = answers(["short one"] * 6, [0.0] * 6, "helpful")
    new = answers(
        ["a much longer one", "tiny", "short one", "short one", "what?", "a much longer one"], [0.0] * 6, "helpful"
    )
    with Run(load_recipe("tiny", {"evaluation.judge_comparisons": 5}), tmp_path / "run", quiet=True) as run:
        found = win_rates(run, "RL-CAI", {"start": start, "RL-CAI": new}, judge, judge.ask)  # type: ignore[arg-type]
        assert sorted(found["helpful"]) == [0.0, 0.5, 0.5, 1.0] and found["red_team"] == []
        assert judge.seen == 3 and run.ledger[-1]["requests"] == 6  # five pairs, two of them equal: not asked
        shown = stages_with_abstentions(run)[-1]
    assert left_out_line(shown) == "judging-rl-cai-helpful: left out 1 of 3 (1 abstained)"
    row = by_name(measures({"start": start, "RL-CAI": new}, {"RL-CAI": found}))[
        "judge prefers it to start, helpful prompts"
    ]
    assert row["values"]["RL-CAI"]["value"] == 50.0 and row["values"]["start"] is None


@given(st.floats(-5, 5), st.floats(0.01, 3), st.floats(-5, 5), st.sampled_from(["above", "below"]))
def test_a_check_is_decided_by_its_interval(value: float, half: float, target: float, side: Any) -> None:
    estimate = {"value": value, "low": value - half, "high": value + half, "n": 9}
    found = check("x", side, target, "sd", estimate, fails="mend it", unknown="measure more")
    inside = estimate["low"] <= target <= estimate["high"]
    right = value > target if side == "above" else value < target
    assert found["outcome"] == ("cannot be told" if inside else "holds" if right else "does not hold")
    assert found["holds"] is (None if inside else right)
    assert found["do"] == ("measure more" if inside else None if right else "mend it")
    assert {"value", "low", "high", "n", "target"} <= set(found)


def checks(data: dict[str, Any], bound: float) -> list[dict[str, Any]]:
    return [*of_reward_model(data), *of_answers(data), of_kl(data["kl"], bound)]


def report_data(**more: Any) -> dict[str, Any]:
    given = three()
    rows = changes(given, {"RL-CAI": {"red_team": [1.0] * 20, "helpful": [0.5] * 20}})
    return {
        "models": list(given),
        "changes": rows,
        "differences": by_name(rows)["reward"]["steps"],
        "reward_model": {
            "by_source": [{"source": "human", "accuracy": {"value": 0.7, "low": 0.58, "high": 0.8, "n": 60}}]
        },
        "kl": {
            "kl_nats": {"value": 39.0, "low": 30.0, "high": 48.0, "n": 40},
            "not_finite": 0,
            "identical": False,
            "examples": 40,
        },
        **more,
    }


def test_checks_hold_the_bound_against_the_written_policy_and_say_what_to_do() -> None:
    found = by_name(checks(report_data(), 25.0))
    kl = found["KL to the reference"]
    assert "policy that is written" in kl["about"]
    assert kl["outcome"] == "does not hold" and "learning_rate" in kl["do"] and kl["n"] == 40
    assert found["reward model right on held-out human comparisons"]["outcome"] == "cannot be told"
    assert found["held-out reward rises, start → SL-CAI"]["outcome"] == "does not hold"
    assert found["held-out reward rises, start → RL-CAI"]["outcome"] == "holds"
    for row in found.values():
        assert bool(row["do"]) is (row["outcome"] != "holds")
    zero = {"value": 0.0, "low": None, "high": None, "n": 40}
    still = {"kl_nats": zero, "not_finite": 0, "identical": True, "examples": 40}
    assert checks(report_data(kl=still), 25.0)[-1]["outcome"] == "holds"
    broken = {"kl_nats": zero, "not_finite": 3, "identical": False, "examples": 40}
    assert checks(report_data(kl=broken), 25.0)[-1]["outcome"] == "does not hold"


def test_one_sentence_says_whether_training_helped_and_of_what_it_cannot_be_told() -> None:
    said = headline(report_data())
    assert said.startswith(
        "Whether training helped cannot be told, since only what it pushed on became better, from start to"
    )
    assert "by measures that training did not push on, it cannot be told whether" in said
    assert "training raised reward (+0.50 sd [0.49, 0.51], n = 42, which is better)" in said
    assert said.count(";") == 1 and said.endswith(".")
    flat = [{**row, "steps": {k: {**e, "low": -1.0, "high": 1.0, "value": 0.1} for k, e in row["steps"].items()}}
            for row in report_data()["changes"]]  # fmt: skip
    assert "raised" not in headline(report_data(changes=flat)) and "equal" not in headline(report_data(changes=flat))
    assert headline(report_data(changes=flat)).startswith(
        "Whether training helped cannot be told, from start to RL-CAI:"
    )


@pytest.mark.parametrize(
    ("moved", "says"),
    [
        ({"boilerplate": -1}, "Training helped: it made 1 of the measures better and none worse"),
        ({"boilerplate": 1}, "Training did harm: it made 1 of the measures worse and none better"),
        ({"boilerplate": 1, "reward": 1}, "Training made 1 of the measures better and 1 worse"),
        ({"length": 1}, "Whether training helped cannot be told, from"),  # neither is better
    ],
)
def test_the_first_words_say_whether_training_helped(moved: dict[str, int], says: str) -> None:
    def estimate(name: str) -> dict[str, Any]:
        way = 10 * moved.get(name, 0)
        return {"value": 0.1 + way, "low": -1.0 + way, "high": 1.2 + way, "n": 40}

    rows = [{**row, "steps": dict.fromkeys(row["steps"], estimate(row["name"]))} for row in report_data()["changes"]]
    assert headline(report_data(changes=rows)).startswith(says)


def test_reward_is_told_at_the_same_kl() -> None:
    path = [
        {"update": i, "kl_nats": kl, "reward": r}
        for i, (kl, r) in enumerate([(0.0, 0.0), (1.5, 0.3), (1.2, 0.4), (3.0, 0.6)])
    ]
    assert [(r["kl_nats"], pytest.approx(r["reward"]), r["update"]) for r in at_same_kl(path)] == [
        (0.5, 0.1, 1), (1.0, 0.2, 1), (2.0, 0.4 + 0.2 * 0.8 / 1.8, 3),
    ]  # fmt: skip
    assert at_same_kl([{"update": 0, "kl_nats": None, "reward": 1.0}]) == [] == at_same_kl([])


def test_costs_are_said_of_every_stage() -> None:
    assert cost({"cost_usd": 0.0}) == "$0.00, runs here"
    assert cost({"cost_usd": 0.0123, "endpoints": ["gpt-x"]}) == "$0.0123, gpt-x"
    assert cost({"cost_usd": None, "endpoints": ["mine"], "unpriced": ["mine"]}) == "price of mine not known"
    assert total_cost([{"cost_usd": 1.0}, {"cost_usd": 0.5}]) == 1.5 and total_cost([{"cost_usd": None}]) is None
    assert model_name("server:org/gpt-5@https://x.example/v1") == "org/gpt-5" and model_name("smollm2") == "smollm2"


@settings(max_examples=50)
@given(
    st.dictionaries(st.text("abc ", min_size=1), st.integers(1, 50), max_size=9), st.integers(0, 100), st.integers(0, 9)
)
def test_what_was_left_out_adds_up(reasons: dict[str, int], records: int, more: int) -> None:
    lost = sum(reasons.values()) + more
    line = left_out_line({"name": "revisions", "records": records, "missing": lost, "reasons": reasons})
    if not lost:
        assert line == ""
    else:
        assert line.startswith(f"revisions: left out {lost} of {records + lost} (")
        assert sum(int(part.split()[0]) for part in line.partition("(")[2].rstrip(")").split(", ")) == lost
    of_prompts = {"name": "ppo", "records": 8, "result": {"left_out": {"too long": 2}, "left_out_of": 192}}
    assert left_out_line(of_prompts) == "ppo: left out 2 of 192 (2 too long)"
    many = {f"error {i}\nin two lines\x1b[0m": 1 for i in range(9)}
    assert "\n" not in counted(many) and "\x1b" not in counted(many) and counted(many).endswith(", 4 for other reasons")
    assert counted({"too long": 1, "empty revision": 2}) == "2 empty revision, 1 too long"


def test_a_stage_without_items_costs_nothing_and_knows_it(tmp_path: Path) -> None:
    with Run(load_recipe("tiny"), tmp_path, quiet=True) as run:
        run.records("pairs", [], lambda batch: [], Pair, left_out={"alike": 2})
    kept = json.loads((tmp_path / "pairs" / "stage.json").read_text())
    for stage in (kept, run.ledger[0]):
        assert [stage[k] for k in ("cost_usd", "seconds", "requests", "prompt_tokens", "completion_tokens")] == [0] * 5
        assert stage["trained_tokens"] == 0 and stage["done"] and stage["left_out"] == {"alike": 2}


def test_a_cost_that_is_not_known_stays_not_known_and_names_the_model(tmp_path: Path) -> None:
    judge = Asked()
    judge.name = "server:mine@http://127.0.0.1:1/v1"
    pairs = [Pair(id=str(i), prompt=(user("q"),), responses=("a", "bb")) for i in range(9)]
    recipe = load_recipe("tiny", {"batch_size": 4})
    with Run(recipe, tmp_path / "run", quiet=True) as run:

        def ask(batch: Sequence[Pair]) -> Iterable[Comparison]:
            judge.cost = None if judge.seen < 4 else 0.25
            yield from judge.ask(batch)

        run.records("comparisons", pairs, ask, Comparison, engines=(judge,))  # type: ignore[arg-type]
    with Run(recipe, tmp_path / "run", quiet=True) as again:  # another process: its engine has spent nothing
        again.records("comparisons", pairs, ask, Comparison, engines=(Asked(),))  # type: ignore[arg-type]
    for stage in (run.ledger[0], again.ledger[0]):
        assert stage["cost_usd"] is None and stage["unpriced"] == ["mine"] == stage["endpoints"]
        assert cost(stage) == "price of mine not known" and stage["requests"] == 18


def test_the_mean_label_of_a_principle_is_of_the_response_sampled_first(tmp_path: Path) -> None:
    with Run(load_recipe("tiny"), tmp_path, quiet=True) as run:
        name = run.constitution.principles[0].id
        rows = [("a", "b", "a", 0.9), ("a", "b", "b", 0.9), ("a", "b", "b", 0.7)]  # first, second, chosen, P(chosen)
        compared = [
            Comparison(
                id=str(i), prompt=(), chosen=(assistant(r[2]),), rejected=(assistant("ab".replace(r[2], "")),), label=r[3],
                first="chosen" if r[0] == r[2] else "rejected",
                judgements=(Judgement(principle=name, forward=r[3], swapped=r[3]),),
            )
            for i, r in enumerate(rows)
        ]  # fmt: skip
        assert all(c.responses == ("a", "b") for c in compared)
        run.put(COMPARISONS, compared)
        assert by_principle(run)[0]["mean_label"] == pytest.approx((0.9 + 0.1 + 0.3) / 3)
