"""Several processes take the steps that one would take."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip
WHOLE, SHARED = [*LAUNCH, "--multi_gpu"], [*LAUNCH, "--use_fsdp", "--fsdp_version", "2"]
SCRIPT = str(Path(__file__).with_name("gradients.py"))
TRAINERS = ["sft", "reward", "feedback", "ppo"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def gradients(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """What a trainer's step had, by how it was started. Each start takes the steps of all trainers: it takes seconds."""

    @functools.cache
    def started(how: str) -> Path:
        out = tmp_path_factory.mktemp(how)
        run([*{"alone": [sys.executable], "whole": WHOLE, "shared": SHARED}[how], SCRIPT, tiny, str(out), *TRAINERS])
        return out

    return lambda how, what: torch.load(started(how) / f"{what}.pt")


@pytest.mark.parametrize("launch", ["whole", "shared"])
@pytest.mark.parametrize("what", TRAINERS)
def test_two_processes_have_the_gradients_of_one(
    what: str, launch: str, gradients: Callable[[str, str], dict[str, Any]]
) -> None:
    alone, two = gradients("alone", what), gradients(launch, what)
    assert (alone["world"], two["world"]) == (1, 2)
    assert two.get("held") == (pytest.approx(0.5, abs=0.01) if launch == "shared" else None)
    assert len(alone["gradients"]) == len(two["gradients"]) > 4
    assert any(g.abs().max() > 1e-4 for g in alone["gradients"])
    for a, b in zip(alone["gradients"], two["gradients"], strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    if what == "ppo":
        assert two["summary"] == pytest.approx(alone["summary"], rel=1e-4, abs=1e-6)
    else:
        assert two["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_the_verbs_run_under_accelerate_and_speak_once(tiny: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"q {i}"}], "chosen": [{"role": "assistant", "content": "good"}],
         "rejected": [{"role": "assistant", "content": "bad"}], "label": 0.9, "labeler": "human"}
        for i in range(8)
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ["--model", tiny, "--dtype", "float32", "--json"]
    solon = [*WHOLE, "-m", "solon"]
    made = run([*solon, "reward-model", "--comparisons", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "rm"),
                "--heldout", "0.25", *common])  # fmt: skip
    [line] = made.stdout.splitlines()
    assert json.loads(line)["heldout"]["human"]["n"] == 2
    made = run([*solon, "ppo", "--prompts", "solon:helpful", "--limit", "4", "--reward-model", str(tmp_path / "rm"),
                "--out", str(tmp_path / "rl"), "--updates", "2", "--rollouts", "4", "--max-tokens", "6",
                "--set", "minibatch=2", "--set", "check_every=1", "--gold", tiny, "--probes", "2", *common])  # fmt: skip
    [line] = made.stdout.splitlines()
    updates = json.loads(line)["updates"]
    assert len(updates) == 2 and updates[1]["check"]["updates"] == 2
    assert (tmp_path / "rl" / "model.safetensors").is_file() and (tmp_path / "rl.tensorboard" / "ppo").is_dir()
    refused = subprocess.run([*solon, "env"], capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0 and "env runs in one process" in refused.stderr


def test_a_shared_trunk_goes_the_way_of_a_whole_one(tiny: str, tmp_path: Path) -> None:
    """Reward model and PPO, with each process holding half of the blocks: the numbers and the model of one process."""
    rows = [
        {"prompt": [{"role": "user", "content": f"q {i}"}], "chosen": [{"role": "assistant", "content": "good " * (i + 1)}],
         "rejected": [{"role": "assistant", "content": "bad"}], "label": 0.9, "labeler": "human"}
        for i in range(5)
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    numbers, weights = [], []
    for name, start in (("alone", [sys.executable]), ("shared", SHARED)):
        reward, out = str(tmp_path / f"{name}-rm"), tmp_path / f"{name}-rl"
        common = [*start, "-m", "solon"], ["--model", tiny, "--dtype", "float32", "--json", "--quiet"]
        run([*common[0], "reward-model", "--comparisons", str(tmp_path / "c.jsonl"), "--out", reward, *common[1]])
        made = run([*common[0], "ppo", "--prompts", "solon:helpful", "--limit", "5", "--reward-model", reward,
                    "--out", str(out), "--updates", "2", "--rollouts", "5", "--max-tokens", "6", "--layers", "1",
                    "--set", "minibatch=2", "--set", "check_every=1", "--probes", "3", *common[1]])  # fmt: skip
        numbers.append([u["reward"] for u in json.loads(made.stdout)["updates"]])
        weights.append(load_file(out / "model.safetensors"))
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-3)
    assert weights[0].keys() == weights[1].keys()
    for name, whole in weights[0].items():
        assert torch.allclose(whole, weights[1][name], atol=1e-4), name
