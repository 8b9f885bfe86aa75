"""A run: every recipe goes through, and one that is killed again and again ends with the records of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from solon.errors import InputError
from solon.recipes.estimate import estimate
from solon.recipes.recipe import Recipe, load_recipe
from solon.records import SFTExample
from solon.runs.journal import Journal, read_journal

SMALL: dict[str, Any] = {
    "model": "tiny-random",
    "dtype": "float32",
    "batch_size": 3,
    "adapter": {"rank": 2, "alpha": 4},
    "prompts.n_red_team": 4,
    "prompts.n_helpful": 4,
    "prompts.n_heldout": 2,
    "reward_model.train": {"epochs": 1},
    "evaluation": {"sampling": {"max_tokens": 6}, "judge_comparisons": 4},
    "feedback.sampling": {"max_tokens": 6},
    "ppo": {"updates": 2, "rollouts": 4, "epochs": 1, "minibatch": 2, "max_tokens": 6},
}
HUMAN = {"human.n_demonstrations": 6, "human.n_comparisons": 12, "human.heldout_comparisons": 4}


def small(name: str, **more: Any) -> Recipe:
    return load_recipe(name, {**SMALL, **more})


def work(recipe: Recipe, out: Path) -> None:
    import torch

    from solon.report.run import run_recipe

    torch.set_num_threads(1)
    run_recipe(recipe, out, quiet=True)


def start(recipe: Recipe, out: Path) -> Any:
    """A real process of its own, forked from a server that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["solon.recipes.pipeline", "trl", "peft", "datasets", "solon.engines.local"])
    process = context.Process(target=work, args=(recipe, out))
    process.start()
    return process


def finish(recipe: Recipe, out: Path) -> None:
    process = start(recipe, out)
    process.join(300)
    assert process.exitcode == 0
    ran = [s["name"] for s in json.loads((out / "report.json").read_text())["stages"]]
    ran = [name.partition("-")[0] if name.startswith(("evaluation-", "judging-")) else name for name in ran]
    assert list(dict.fromkeys(ran)) == [row["name"] for row in estimate(recipe)]  # what --dry-run said


def records(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Every journal of a run, by stage, in order; the path of the run itself taken out."""
    found = {}
    for path in sorted(out.glob("*/records.jsonl")):
        rows = [json.loads(line.replace(str(out), "OUT")) for line in path.read_text().splitlines()]
        found[path.parent.name] = sorted(rows, key=lambda r: r["id"])
    return found


def examples_of(out: Path, stage: str) -> list[SFTExample]:
    """The SFT examples that a stage learned; as many as its ledger counts."""
    lines = (out / stage / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == json.loads((out / stage / "stage.json").read_text())["records"]
    return [SFTExample.model_validate_json(line) for line in lines]


def test_killed_in_each_stage_it_ends_with_the_records_of_an_unkilled_run(tmp_path: Path) -> None:
    recipe = small(
        "hybrid",
        **HUMAN,
        **{
            "feedback.adapter": None,
            "supervised.sampling": {"max_tokens": 12, "temperature": 0.5},
            "constitution": "simple",
        },
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(recipe, whole)
    stages = [s["name"] for s in json.loads((whole / "report.json").read_text())["stages"]]
    assert len(stages) >= 12
    landed = []
    for before, stage in zip(["", *stages], stages, strict=False):
        process = start(recipe, killed)
        done = killed / before / "stage.json" if before else killed / "recipe.yaml"
        deadline = time.monotonic() + 120
        while not (done.is_file() and (not before or json.loads(done.read_text())["done"])):
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.002)
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        state = killed / stage / "stage.json"
        landed.append(not (state.is_file() and json.loads(state.read_text())["done"]))
    assert sum(landed) >= len(stages) - 4  # the shortest stages of a tiny model may be over within 0.05 s
    finish(recipe, killed)
    assert records(killed) == records(whole)
    for stage in ("warmup", "sl-cai"):
        examples = [(out / stage / "examples.jsonl").read_text().replace(str(out), "OUT") for out in (killed, whole)]
        assert examples[0] == examples[1]
    weights = "models/rl-cai/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert len(json.loads((killed / "validation" / "sample.jsonl").read_text().splitlines()[0])) == 6


@pytest.mark.parametrize(
    ("name", "more", "models"),
    [
        (
            "constitutional",
            {
                "supervised.revisions": 2,
                "supervised.sampling": {"max_tokens": 12, "temperature": 0.5},
                "supervised.train": {"epochs": 1},
            },
            ["start", "SL-CAI", "RL-CAI"],
        ),
        ("rlaif", {"feedback.judge": "self"}, ["start", "RLAIF"]),
        ("rlhf", {**HUMAN, "warmup.train": {"epochs": 1}}, ["start", "SFT", "RLHF"]),
    ],
)
def test_the_other_recipes_go_through(name: str, more: dict[str, Any], models: list[str], tmp_path: Path) -> None:
    recipe = small(name, **more)
    finish(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"] == models
    trained = {s["name"] for s in report["stages"] if s.get("trained_tokens")}
    assert {p.name for p in (tmp_path / "out" / "tensorboard").iterdir()} == trained
    found = records(tmp_path / "out")
    if name == "rlhf":
        assert "comparisons" not in found and "revisions" not in found  # no AI feedback
    else:
        for row in found["comparisons"]:
            assert len(row["judgements"]) == 1 and set(row["meta"]) >= {"constitution", "model_fingerprint", "seed"}
    if name == "rlaif":
        assert {row["principle"] for row in found["comparisons"]} == {"question"}
    if name == "constitutional":
        learned = examples_of(tmp_path / "out", "sl-cai")
        principles = {row["id"]: [step["principle"] for step in row["steps"]] for row in found["revisions"]}
        revised = [e for e in learned if "principles" in e.meta]
        assert revised
        for e in revised:  # the id says how many steps of the chain shaped the text
            assert e.meta["principles"] == principles[e.meta["prompt_id"]][: int(e.id.rpartition("/")[2])]
    if name == "rlhf":
        assert len(examples_of(tmp_path / "out", "warmup")) == 6  # the demonstrations
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    AutoModelForCausalLM.from_pretrained(tmp_path / "out/models/rl-cai")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/models/reward-model")


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "dpo"])
def test_another_algorithm_is_one_line_of_the_recipe(algorithm: str, tmp_path: Path) -> None:
    online = {"max_steps": 8, "generation_batch_size": 4, "per_device_train_batch_size": 2, "num_generations": 2,
              "max_completion_length": 6}  # fmt: skip
    own = {"num_train_epochs": 2, "per_device_train_batch_size": 2} if algorithm == "dpo" else online
    recipe = small("rlhf", **HUMAN, **{"warmup.train": {"epochs": 1}, "algorithm": algorithm, algorithm: own})
    finish(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = records(tmp_path / "out")
    assert report["algorithm"] == algorithm and "ppo" not in found
    updates = found[algorithm]
    if algorithm == "dpo":
        assert all("reward" not in u and u["policy_loss"] > 0 for u in updates)  # it samples nothing
        assert "rewards/margins" in updates[0]["meta"]
    else:
        assert len(updates) == 2 and all(u["reward"] is not None and u["response_tokens"] > 0 for u in updates)
        assert '<div class="curves">' in (tmp_path / "out" / "report.html").read_text()
    start, made = (load_file(tmp_path / "out/models" / name / "model.safetensors") for name in ("warmup", "rl-cai"))
    assert any((start[key] - made[key]).abs().max() > 0 for key in start)
    assert f"## {algorithm.upper()}" in (tmp_path / "out" / "report.md").read_text()
    assert report["kl"]["examples"] == 4 and not report["kl"]["identical"]  # of the policy that is written


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"algorithm": "ppp"}, 'the algorithms are dpo, grpo, ppo, rloo; did you mean "ppo"'),
        ({"algorithm": "grpo", "grpo.num_generations": 1}, "grpo.num_generations: input should be greater"),
        ({"algorithm": "rloo", "rloo.generation_batch_size": 6, "rloo.num_generations": 4}, "not a multiple"),
        ({"algorithm": "dpo", "dpo.check_every": 2}, 'unknown key "dpo.check_every"'),
        ({"algorithm": "dpo", "feedback.direct": True}, "feedback.direct makes none"),
        ({"reward_model.train.uncertainty_penalty": 1.0}, "set members to 3 or more"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_recipe("rlaif", more)


def test_ppo_in_a_run_is_checked_by_the_judge_and_reported(tmp_path: Path) -> None:
    ppo = {**SMALL["ppo"], "check_every": 1}
    members = {"epochs": 1, "members": 2, "uncertainty_penalty": 0.5}
    recipe = small("rlaif", **{"ppo": ppo, "gold.probes": 4, "reward_model.train": members})
    finish(recipe, tmp_path / "out")
    checks = [u["check"] for u in records(tmp_path / "out")["ppo"]]
    assert [c["updates"] for c in checks] == [1, 2] and all(c["gold"]["n"] + c["abstained"] == 4 for c in checks)
    said = (tmp_path / "out" / "report.md").read_text()
    assert "### Checks while training" in said and "### What the rollouts say" in said
    assert list((tmp_path / "out" / "tensorboard" / "ppo").glob("events.*"))


def test_a_judge_that_rates_nothing_is_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solon.feedback.rating.expected_rating", lambda scores: (None, "gave no rating"))
    with pytest.raises(InputError, match=r"rated none of \d+ responses: gave no rating; try feedback.scale: broken"):
        work(small("rlaif", **{"feedback.judge": "self", "feedback.direct": True}), tmp_path / "out")


def test_direct_rlaif_has_the_judge_for_its_reward(tmp_path: Path) -> None:
    # Random weights give ten levels and their closing bracket next to nothing; two letters they give enough.
    direct = {"feedback.judge": "self", "feedback.direct": True, "feedback.scale": "broken"}
    finish(small("rlaif", **direct), tmp_path / "out")
    judged = json.loads((tmp_path / "out/judge-reward/stage.json").read_text())["result"]
    assert judged["abstained"] < judged["examples"] and judged["std"] > 1e-6  # a reward that tells responses apart
    assert not (tmp_path / "out/models/reward-model").exists() and "comparisons" not in records(tmp_path / "out")
    asked = json.loads((tmp_path / "out/ppo/stage.json").read_text())["requests"]
    assert asked >= len(records(tmp_path / "out")["ppo"])  # the ledger knows what the judge was asked
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["models"] == ["start", "RLAIF"] and report["measures"][0]["name"] == "reward"
    asked = {s["name"]: s["requests"] for s in report["stages"]}
    for name in ("evaluation-start", "evaluation-rlaif"):
        assert "none was trained" in (tmp_path / "out/report.md").read_text()
        assert asked[name] == 2 * 4  # four answers, and four ratings of them
    assert report["kl"]["examples"] == 4


def test_the_bound_is_held_against_the_policy_that_is_written(tmp_path: Path) -> None:
    """The only update's rollouts come from the policy before it, so training reports 0 nats; what is written is far away."""
    ppo = {
        **SMALL["ppo"],
        "updates": 1,
        "rollouts": 8,
        "epochs": 8,
        "learning_rate": 0.1,
        "kl_bound": 0.5,
        "max_tokens": 12,
    }
    recipe = small("rlaif", **{"feedback.judge": "self", "ppo": ppo, "prompts.n_heldout": 16})
    finish(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    [update] = report["ppo"]
    [check] = [c for c in report["checks"] if c["name"] == "KL to the reference"]
    assert update["kl_nats"] == 0 and report["kl"]["kl_nats"]["value"] > 1 and report["kl"]["kl_nats"]["n"] == 32
    assert check["outcome"] == "does not hold" and check["n"] == 32 and check["low"] > 0.5 and check["do"]
    assert report["differences"].keys() == {"start → RLAIF"} and report["seed"] == 0 and report["machine"]["cores"]


def test_tiny_recipe_as_shipped(tmp_path: Path) -> None:
    finish(load_recipe("tiny"), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"] == ["start", "SL-CAI", "RL-CAI"]
    assert {c["name"] for c in report["checks"]} >= {"KL to the reference", "distinct-3 falls by"}
    assert {c["outcome"] for c in report["checks"]} <= {"holds", "does not hold", "cannot be told"}
    assert {"start → SL-CAI", "SL-CAI → RL-CAI", "start → RL-CAI"} == report["differences"].keys()
    assert report["headline"] in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert (
        all(s["cost_usd"] == 0 for s in report["stages"])
        and "runs here" in (tmp_path / "out" / "report.md").read_text()
    )
    assert len(report["answers"]) == 6
    html = (tmp_path / "out" / "report.html").read_text()
    assert "distinct-3" in html and "<script" not in html


def test_a_run_goes_on_with_the_same_data_only(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(6)))
    recipe = small("rlhf", **HUMAN, **{"warmup.train": {"epochs": 1}, "prompts.helpful": str(prompts)})
    process = start(recipe, tmp_path / "out")
    while not (tmp_path / "out" / "inputs.json").is_file():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    prompts.write_text(prompts.read_text() + '{"prompt": "one more"}\n')
    with pytest.raises(InputError, match=r"inputs.json: this run was started with another inputs"):
        work(recipe, tmp_path / "out")


def test_a_run_directory_keeps_to_its_recipe(tmp_path: Path) -> None:
    from solon.runs.run import Run

    recipe = load_recipe("tiny")
    with (
        Run(recipe, tmp_path, quiet=True),
        pytest.raises(InputError, match="another solon process"),
        Run(recipe, tmp_path, quiet=True),
    ):
        pass
    other = load_recipe("tiny", {"ppo.updates": 7})
    with pytest.raises(InputError, match=r"ppo.updates: 2 → 7"), Run(other, tmp_path, quiet=True):
        pass


def _write_forever(path: Path) -> None:
    with Journal(path) as journal:
        for i in range(10**9):
            journal.append({"id": str(i), "text": "x" * (i % 97)})


def test_a_journal_killed_at_any_instant_keeps_whole_records_in_order(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("forkserver")
    for n in range(6):
        process = context.Process(target=_write_forever, args=(path,))
        size = path.stat().st_size if path.exists() else 0
        process.start()
        while not path.exists() or path.stat().st_size <= size:
            time.sleep(0.001)
        time.sleep(0.003 * n)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with Journal(path) as journal:
            assert [r["id"] for _, r in read_journal(path)] == [str(i) for i in range(len(journal.ids))]


def test_a_torn_tail_is_cut_and_an_id_is_never_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Journal(path) as journal:
        assert journal.append({"id": "a"}) and not journal.append({"id": "a"})
    with path.open("ab") as file:
        file.write(b'{"id": "b", "te')
    with Journal(path) as journal:
        assert journal.ids == {"a"}
        journal.append({"id": "c"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]
