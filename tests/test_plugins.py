"""Laws of packages that add to Solon: what they add has a place of its own, and their faults are said to be theirs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solon.analysis.measures import Answer, Measure
from solon.errors import InputError
from solon.plugins import as_number
from solon.records import user

FANCY = """
from solon.reinforcement.settings import PPOSettings
from solon.stages.reinforcement import Reinforcement

class FancySettings(PPOSettings):
    '''PPO with another name.'''

class Fancy(Reinforcement):
    name, part, settings = "fancy", "fancy", SETTINGS
    def train(self, run, log, step, out): ...
    def sampling(self, settings): ...

    def estimate(self, plan): ...
"""
JUDGE = """
from solon.feedback.judge import Judge

class Own(Judge):
    name = "NAME"
    def first_log_odds(self, pair):
        return VALUE
"""
VERB = """
from solon.runs.options import Verb

class Own(Verb):
    name, help, example, options = "NAME", "h", "e", ()
    def run(self, call): ...
"""


def with_package(folder: Path, group: str, source: str, name: str) -> dict[str, str]:
    """The environment in which a package `plugged` is installed, with one entry point."""
    (folder / "plugged.py").write_text(source)
    info = folder / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nown = plugged:{name}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def python(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def test_settings_that_extend_a_section_do_not_take_its_place(tmp_path: Path) -> None:
    env = with_package(tmp_path, "solon.stages", FANCY.replace("SETTINGS", "FancySettings"), "Fancy")
    text = (
        "from solon.recipes.recipe import load_recipe; from solon.reinforcement.settings import PPOSettings; "
        "from plugged import FancySettings; r = load_recipe('tiny', {'fancy': {'updates': 5}}); "
        "print(r.of(PPOSettings).updates, r.of(FancySettings).updates)"
    )
    done = python(env, "-c", text)
    assert done.stdout.split() == ["2", "5"], done.stderr


@pytest.mark.parametrize(
    ("group", "source", "name", "message"),
    [
        ("solon.stages", FANCY.replace("SETTINGS", "PPOSettings"), "Fancy", "make a subclass of it for the section fancy"),
        ("solon.stages", FANCY.replace("def train", "def trian").replace("SETTINGS", "FancySettings"), "Fancy", "lacks train"),
        ("solon.stages", FANCY.replace('"fancy", SETTINGS', '"find", FancySettings'), "Fancy", "rename the section"),
        ("solon.stages", "x = 3", "x", "is no"),
        ("solon.stages", VERB.replace("NAME", "label"), "Own", "two commands are called label"),
        ("solon.stages", VERB.replace("NAME", "run"), "Own", "two commands are called run"),
        ("solon.judges", "x = 3", "x", "is no judge"),
        ("solon.judges", JUDGE.replace("NAME", "longer"), "Own", "two judges are called longer"),
        ("solon.judges", JUDGE.replace("NAME", "own").replace("def first_log_odds", "def log_odds"), "Own", "defines neither"),
        ("solon.judges", JUDGE.replace("NAME", "own").replace("VALUE", "'1.0'"), "Own", "first_log_odds gave '1.0'"),
        ("solon.judges", JUDGE.replace("NAME", "own").replace("VALUE", "float('nan')"), "Own", "first_log_odds gave nan"),
    ],
)  # fmt: skip
def test_an_addition_that_cannot_be_used_is_one_line(
    tmp_path: Path, group: str, source: str, name: str, message: str
) -> None:
    env = with_package(tmp_path, group, source.replace("VALUE", "1.0"), name)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "responses": ["a", "b c"]}) + "\n")
    if group == "solon.judges":
        spec = "judge:own" if '"own"' in source else "judge:longer"
        arguments = ["label", "--pairs", str(pairs), "--model", spec, "--out", str(tmp_path / "l.jsonl"), "--quiet"]
    else:
        arguments = ["run", "tiny", "--dry-run", "--out", str(tmp_path / "run")]
    done = python(env, "-m", "solon", *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_error_in_a_package_is_said_to_be_the_package_s(tmp_path: Path) -> None:
    env = with_package(tmp_path, "solon.judges", JUDGE.replace("NAME", "own").replace("VALUE", "{}['x']"), "Own")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "responses": ["a", "b c"]}) + "\n")
    out = str(tmp_path / "l.jsonl")
    done = python(env, "-m", "solon", "label", "--pairs", str(pairs), "--model", "judge:own", "--out", out, "--quiet")
    assert done.returncode == 1 and "a fault of the package plugged (KeyError" in done.stderr


def test_direct_rewards_need_a_judge_that_rates(tmp_path: Path) -> None:
    given = ["--set", "feedback.direct=true", "--set", "feedback.judge=judge:longer", "--set", "feedback.labels=ai"]
    given += ["--set", "feedback.warmup=null"]
    done = python(dict(os.environ), "-m", "solon", "run", "tiny", *given, "--dry-run", "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and "does not rate a single one" in done.stderr


@pytest.mark.parametrize(("value", "is_share"), [("many", False), (float("nan"), False), (3, True)])
def test_a_measure_gives_numbers_and_a_share_gives_0_or_1(value: Any, is_share: bool) -> None:
    measure = Measure("m", "", "higher", False, lambda a: value, is_share=is_share)
    answer = Answer(id="a", prompt=(user("q"),), answer="x", ended=True)
    with pytest.raises(InputError, match='the measure "m" gave'):
        measure.of([answer])


def test_a_number_may_be_of_any_number_type() -> None:
    values = (1, True, np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1.0))
    assert all(type(as_number(v, "x")) is float and as_number(v, "x") == 1 for v in values)
    assert as_number(-math.inf, "x") == -math.inf
