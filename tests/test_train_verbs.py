"""The training verbs on their own, from files to a model; what they cannot use is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from solon.cli import app
from solon.prompts import read_comparisons
from solon.reinforcement.reward_model import RewardModel

COMMON = ["--dtype", "float32", "--quiet", "--json"]


def comparisons(path: Path, n: int = 24) -> str:
    """Shipped comparisons, every second one as a judge's."""
    rows = read_comparisons("solon:comparisons-harmless")[:n]
    by = [r.model_copy(update={"labeler": "ai", "label": 0.8}) if i % 2 else r for i, r in enumerate(rows)]
    path.write_text("".join(json.dumps(r.to_json()) + "\n" for r in by))
    return str(path)


def test_from_comparisons_to_a_reward_model_to_a_policy(tiny: str, tmp_path: Path) -> None:
    given = comparisons(tmp_path / "c.jsonl")
    done = CliRunner().invoke(
        app,
        ["reward-model", "--comparisons", given, "--out", str(tmp_path / "rm"), "--model", tiny, "--heldout", "0.4",
         "--members", "2", "--uncertainty-penalty", "0.5", "--human-weight", "2", "--margin", "0.2", *COMMON],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    assert {"human", "ai"} == set(made["heldout"]) and made["heldout_n"] == sum(
        x["n"] for x in made["heldout"].values()
    )
    assert 0 <= made["heldout_accuracy"] <= 1
    for found in made["heldout"].values():
        assert {"accuracy", "longer_is_better", "length_correlation", "calibration"} <= set(found)
    assert list((tmp_path / "rm.tensorboard" / "reward-model").glob("events.*"))
    rewards = RewardModel.load(str(tmp_path / "rm"), "float32")
    assert len(rewards.members) == 2 and rewards.penalty == 0.5
    ppo = ["ppo", "--prompts", "solon:helpful", "--limit", "6", "--reward-model", str(tmp_path / "rm"), "--model", tiny,
           "--out", str(tmp_path / "rl"), "--rollouts", "4", "--max-tokens", "6", "--set", "minibatch=2"]  # fmt: skip
    done = CliRunner().invoke(app, [*ppo, "--updates", "1", *COMMON])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout.splitlines()[-1])["updates"]) == 1
    done = CliRunner().invoke(app, [*ppo, "--updates", "2", *COMMON])  # goes on
    assert [u["update"] for u in json.loads(done.stdout.splitlines()[-1])["updates"]] == [1]
    done = CliRunner().invoke(app, [*ppo, "--updates", "2", "--seed", "3", *COMMON])
    assert done.exit_code == 2 and "another seed" in done.output


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        (["ppo", "--set", "kl_stopp=1"], 'no such setting of PPO; did you mean "kl_stop"?'),
        (["ppo", "--set", "kl_stop"], "expected KEY=VALUE"),
        (["ppo", "--updates", "0"], "--updates: "),
        (["ppo", "--gold", "smollm2"], "add --set check_every=10"),
        (["ppo", "--rollouts", "3", "--set", "responses_per_prompt=2"], "rollouts: 3 is not a multiple"),
        (["reward-model", "--uncertainty-penalty", "1"], "add --members 3"),
        (["reward-model", "--epochs", "0"], "--epochs: "),
        (["sft", "--epochs", "0"], "--epochs: "),
    ],
)
def test_a_wrong_setting_is_one_line(verb: list[str], says: str, tiny: str, tmp_path: Path) -> None:
    given = {
        "ppo": ["--prompts", "solon:helpful", "--reward-model", str(tmp_path)],
        "reward-model": ["--comparisons", "solon:comparisons-harmless"],
        "sft": ["--data", "solon:demonstrations-harmless"],
    }[verb[0]]
    done = CliRunner().invoke(app, [*verb, *given, "--model", tiny, "--out", str(tmp_path / "out"), *COMMON])
    assert done.exit_code == 2
    line = done.output.strip()
    assert line.startswith("solon: ") and "\n" not in line and says in line
