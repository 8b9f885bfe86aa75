"""The training verbs on their own, from files to a model; what they cannot use is said in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from solon.cli import app
from solon.data import read_comparisons
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
    assert done.exit_code == 2 and "another seed (seed: 0 → 3)" in done.output
    done = CliRunner().invoke(app, [*ppo, "--updates", "2", *COMMON])  # once more: nothing is left to do
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["updates"] == []
    shutil.rmtree(tmp_path / "rl")  # the checkpoint alone knows what it was made of
    for more, says in (
        (["--system", "Be brief."], "another system"),
        (["--limit", "5"], "prompts: 6 records .* → 5 records"),
        (["--set", "clip=0.3"], "settings.clip: 0.2 → 0.3"),
    ):
        done = CliRunner().invoke(app, [*ppo, "--updates", "2", *more, *COMMON])
        assert done.exit_code == 2 and re.search(says, done.output), done.output
    change_a_weight(tmp_path / "rm")
    done = CliRunner().invoke(app, [*ppo, "--updates", "2", *COMMON])
    assert done.exit_code == 2 and "another reward" in done.output
    done = CliRunner().invoke(app, [*ppo, "--updates", "2", "--restart", *COMMON])
    assert done.exit_code == 0 and len(json.loads(done.stdout.splitlines()[-1])["updates"]) == 2


def change_a_weight(model: Path) -> None:
    """One number deep inside a tensor, the file's size and header as they were."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 0x40
    path.write_bytes(data)


def verb(name: str, tiny: str, given: str) -> list[str]:
    what = {
        "sft": ["--data", "solon:demonstrations-harmless", "--limit", "4", "--batch-size", "2"],
        "feedback-model": ["--comparisons", given, "--limit", "6"],
        "reward-model": ["--comparisons", given, "--limit", "6"],
        "ppo": ["--prompts", "solon:helpful", "--limit", "4", "--rollouts", "2", "--updates", "1", "--max-tokens", "4"],
    }[name]
    return [name, *what, "--model", tiny, *COMMON]


@pytest.mark.parametrize("name", ["sft", "feedback-model", "reward-model"])
def test_a_training_verb_writes_over_nothing_but_its_own(name: str, tiny: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / ".git").mkdir(parents=True)
    (mine / "thesis.tex").write_text("years")
    call = verb(name, tiny, comparisons(tmp_path / "c.jsonl"))
    for out, says in (
        ("mine", "did not put there"),
        ("c.jsonl", "is a"),
        ("c.jsonl/x", "below a file"),
        ("a/b", "mkdir"),
    ):
        done = CliRunner().invoke(app, [*call, "--out", str(tmp_path / out)])
        assert done.exit_code == 2 and says in done.output and done.output.count("\n") == 1, done.output
    out = tmp_path / "out"
    (tmp_path / "out.tensorboard").mkdir()
    (tmp_path / "out.tensorboard" / "notes.txt").write_text("mine")
    done = CliRunner().invoke(app, [*call, "--out", str(out)])
    assert done.exit_code == 2 and "out.tensorboard: holds files" in done.output and not out.exists()
    (tmp_path / "out.tensorboard" / "notes.txt").unlink()
    done = CliRunner().invoke(app, [*call, "--out", str(out)])
    assert done.exit_code == 0, done.output
    first, weights = json.loads(done.stdout.splitlines()[-1]), (out / "model.safetensors").read_bytes()
    done = CliRunner().invoke(app, [*call, "--out", str(out)])  # the same: nothing to do
    again = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and {**first, "trained": False} == again
    done = CliRunner().invoke(app, [*call, "--seed", "1", "--out", str(out)])
    assert done.exit_code == 2 and "seed: 0 → 1" in done.output and (out / "model.safetensors").read_bytes() == weights
    done = CliRunner().invoke(app, [*call, "--seed", "1", "--restart", "--out", str(out)])
    assert done.exit_code == 0 and (out / "model.safetensors").read_bytes() != weights
    (out / "notes.txt").write_text("mine")
    done = CliRunner().invoke(app, [*call, "--restart", "--out", str(out)])
    assert done.exit_code == 2 and "(notes.txt)" in done.output and (out / "notes.txt").read_text() == "mine"


def test_the_model_in_training_is_never_the_output(tiny: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (tmp_path / "link").symlink_to(base)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    for out in ("base", "link", "base/inner"):
        for more in ([], ["--restart"]):
            done = CliRunner().invoke(app, [*verb("sft", str(base), ""), *more, "--out", str(tmp_path / out)])
            assert done.exit_code == 2 and "input" in done.output
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


def test_held_out_comparisons_of_a_reward_model_share_no_prompt_with_training(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_comparisons("solon:comparisons-harmless")[:8]
    many = [r.model_copy(update={"id": f"{r.id}-{n}", "label": 0.5 + 0.1 * n}) for r in rows for n in range(3)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in many))
    seen: dict[str, set[str]] = {}

    class Enough(Exception):
        pass

    def train(training: list[Any], *args: Any, **options: Any) -> Any:
        seen["training"] = {json.dumps(c.to_json()["prompt"]) for c in training}
        raise Enough

    monkeypatch.setattr("solon.reinforcement.reward_training.train_reward_model", train)
    call = ["reward-model", "--comparisons", str(tmp_path / "c.jsonl"), "--model", tiny, "--heldout", "0.3", *COMMON]
    CliRunner().invoke(app, [*call, "--out", str(tmp_path / "rm")])
    everything = {json.dumps(r.to_json()["prompt"]) for r in rows}
    assert 0 < len(everything - seen["training"]) <= 3 and len(seen["training"]) >= 5


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        (["ppo", "--set", "kl_stopp=1"], 'no such setting of solon ppo; did you mean "kl_stop"?'),
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
