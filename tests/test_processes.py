"""Several processes take the steps that one would take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip
SCRIPT = str(Path(__file__).with_name("gradients.py"))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("what", ["sft", "reward", "feedback", "ppo"])
def test_two_processes_have_the_gradients_of_one(what: str, tiny: str, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for name, start in (("alone", [sys.executable]), ("two", LAUNCH)):
        (tmp_path / name).mkdir()
        run([*start, SCRIPT, what, tiny, str(tmp_path / name)])
        found.append(torch.load(tmp_path / name / "found.pt"))
    alone, two = found
    assert (alone["world"], two["world"]) == (1, 2)
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
    solon = [*LAUNCH, "-m", "solon"]
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
