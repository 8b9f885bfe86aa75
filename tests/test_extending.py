"""What docs/extending.md shows works as it stands: the guide's package is installed and used, and Solon is not changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the guide's package in it, as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    files = {m[1]: m[0] for m in re.finditer(r"^# (\S+\.(?:py|toml))\n(?s:.*?)(?=^```$)", GUIDE.read_text(), re.M)}
    assert len(files) == 7
    (folder / "toys").mkdir()
    for name, match in files.items():
        if name.endswith(".py"):
            (folder / name).write_text(match)
    (folder / "toys" / "__init__.py").write_text("")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, found in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in found.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def solon(toys: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(toys), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "solon", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_a_run_with_a_stage_a_judge_an_algorithm_and_a_measure_of_another_package(toys: Path, tmp_path: Path) -> None:
    settings = {
        "dtype": "float32", "supervised": "null", "feedback.labels": "ai", "feedback.warmup": "null",
        "feedback.judge": "judge:polite", "algorithm": "length-training", "length_training.n": "3",
        "count_words.at_least": "2", "human.validation_sample": "0", "short_reward.words": "5",
    }  # fmt: skip
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    planned = solon(toys, "run", "tiny", *given, "--out", str(tmp_path / "run"), "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    rows = [row["name"] for row in json.loads(planned.stdout.splitlines()[-1])["stages"]]
    assert {"count-words", "mean-words", "length-training"} <= set(rows) and "ppo" not in rows
    assert "judge:polite" in planned.stderr
    done = solon(toys, "run", "tiny", *given, "--out", str(tmp_path / "run"), "--quiet")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [s["name"] for s in report["stages"] if s["name"] in rows] == [
        n for n in rows if n not in ("evaluation", "judging")
    ]
    assert report["words_per_pair"] > 0 and report["algorithm"] == "length-training"
    counted = [json.loads(line) for line in (tmp_path / "run/count-words/records.jsonl").read_text().splitlines()]
    assert report["words_per_pair"] == pytest.approx(sum(row["words"] for row in counted) / len(counted))
    answers = [json.loads(line) for line in (tmp_path / "run/evaluation-start/records.jsonl").read_text().splitlines()]
    assert all(
        row["reward"] == -abs(len(row["answer"].split()) - 5) / 5 for row in answers
    )  # the reward of the package
    assert "exclamation marks" in {m["name"] for m in report["measures"]}
    text = (tmp_path / "run" / "report.md").read_text()
    assert "## Words per pair" in text and "| exclamation marks |" in text and "## LENGTH-TRAINING" in text
    compared = [json.loads(line) for line in (tmp_path / "run/comparisons/records.jsonl").read_text().splitlines()]
    assert all(row["label"] in (0.5, pytest.approx(0.880797)) for row in compared)
    again = solon(toys, "run", "tiny", *given, "--out", str(tmp_path / "run"), "--quiet")
    assert again.returncode == 0, again.stderr  # it resumes


def test_a_verb_of_another_package(toys: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "responses": ["no", "Please wait."]}) + "\n")
    done = solon(toys, "count-words", "--pairs", str(pairs), "--at-least", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["words"] == 2


def test_a_recipe_is_checked_against_the_settings_of_another_package(toys: Path, tmp_path: Path) -> None:
    done = solon(toys, "run", "tiny", "--set", "count_words.at_lest=2", "--out", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 2 and 'unknown key "count_words.at_lest"; did you mean "at_least"?' in done.stderr
    done = solon(toys, "run", "tiny", "--set", "algorithm=lenght-training", "--out", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 2 and 'did you mean "length-training"?' in done.stderr


def test_an_engine_and_a_judge_of_another_package_are_named_like_any_model(toys: Path, tmp_path: Path) -> None:
    chains = ["critique", "--prompts", "solon:red-team", "--limit", "2", "--out", str(tmp_path / "chains.jsonl")]
    done = solon(toys, *chains, "--model", "echo:x", "--quiet")
    assert done.returncode == 0, done.stderr
    [first, _] = [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert (
        first["response"].split() == first["prompt"][-1]["content"].split()[:96] and first["meta"]["model"] == "echo:x"
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "responses": ["no", "Please wait."]}) + "\n")
    for model in ("judge:polite", "judge:longer", "echo:x"):
        out = tmp_path / f"{model.replace(':', '-')}.jsonl"
        done = solon(toys, "label", "--pairs", str(pairs), "--model", model, "--out", str(out), "--quiet")
        assert done.returncode == 0, done.stderr
        [row] = [json.loads(line) for line in out.read_text().splitlines()]
        if model.startswith("judge:"):
            assert row["chosen"][0]["content"] == "Please wait." and row["first"] == "rejected"
    done = solon(toys, "label", "--pairs", str(pairs), "--model", "judge:polit", "--out", str(tmp_path / "x.jsonl"))
    assert done.returncode == 2 and 'did you mean "polite"?' in done.stderr
    done = solon(
        toys, "sft", "--data", "solon:demonstrations-harmless", "--model", "echo:x", "--out", str(tmp_path / "m")
    )
    assert done.returncode == 2 and "must run in this process" in done.stderr
