"""Recipes: what is wrong is said with its line, numbers are finite, and what a run writes down reads back the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solon.engines.sampling import SamplingSettings
from solon.errors import InputError
from solon.feedback.settings import JudgeSettings
from solon.models.settings import AdapterSettings
from solon.recipes.recipe import builtin_recipes, load_recipe
from solon.reinforcement.settings import PPOSettings, RewardSettings
from solon.runs.common import dump_recipe
from solon.stages.pairs import PairSettings
from solon.stages.revisions import RevisionSettings
from solon.training.settings import TrainSettings
from solon.yaml_text import assignment

texts = st.text(st.characters(codec="utf-8"))


@pytest.mark.parametrize("name", list(builtin_recipes()))
def test_recipes_load_and_survive_being_written_down(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\nmodle: smollm2\n", r':2: unknown key "modle"; did you mean "model"'),
        ("name: x\nppo:\n  updates: 3\n  rollout: 4\n", r':4: unknown key "ppo.rollout"; did you mean "rollouts"'),
        ("name: x\nppo: {updates: 0}\n", r":2: ppo.updates: input should be greater than or equal to 1"),
        ("name: x\nname: y\n", ":2: "),
        ("name: x\nwarmup: {}\n", "warmup needs human.demonstrations"),
        ("name: x\nfeedback: {labels: human}\n", "needs human.comparisons"),
        ("name: x\nsupervised:\n  train:\n    epoch: 2\n", r':4: unknown key "supervised.train.epoch"'),
        ("- a\n", ":1: the file holds a list; expected keys"),
        ("", ":1: the file is empty"),
        ("name: [x\n", ":1: not valid YAML"),
        ("name: x\na: &a [1]\nb: *a\n", ":2: an anchor"),
        ("name: x\nmodel: *a\n", ":2: an alias"),
        ("name: !!python/object:os.system x\n", ":1: a tag"),
        ("name: x\nseed: !!int 3\n", ":2: a tag"),
        ("name: " + "[" * 3000, ":1: nested too deeply"),
        ("name: x\ndescription: a\0b\n", r":2: the character U\+0000"),
        ("name: x\n" + "# filler\n" * 150_000, "over 1 MiB"),
        ("name: x\n--- \nname: y\n", ":2: a second document"),
        ("name: x\nseed: true\n", ":2: seed: true is no number"),
        ('name: x\nseed: "3"\n', ':2: seed: "3" is a text; expected a number'),
        ('name: x\nsystem: "a\\ud800"\n', ":2: system: holds half of a surrogate pair"),
        ("name: x\nseed: -1\n", ":2: seed: input should be greater"),
        ("name: 2024\n", ":1: name: expected a text; put quotes around 2024"),
        ("name: x\nppo: 3\n", ":2: ppo: expected keys with values; the keys here are updates"),
        ("name: x\nsupervised: {critique: 1}\n", "1 is a number; expected true or false"),
        ("name: x\nfeedback:\n  clamp: [true, 0.6]\n", ":3: feedback.clamp: true is no number"),
    ],
)
def test_a_wrong_recipe_is_said_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def test_a_key_that_a_section_leaves_out_keeps_the_default_of_that_section() -> None:
    part = load_recipe(
        "rlaif", {"feedback.sampling": {"max_tokens": 12}, "feedback.rationale_sampling.temperature": 0.1}
    )
    pairs, judge = part.of(PairSettings).sampling, part.of(JudgeSettings).rationale_sampling
    assert pairs == PairSettings().sampling.model_copy(update={"max_tokens": 12})
    assert judge == JudgeSettings().rationale_sampling.model_copy(update={"temperature": 0.1})


def test_a_date_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: 2024-01-01\nsystem: 2024-99-99\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.system) == ("2024-01-01", "2024-99-99")


NUMBERS = [
    (name, key)
    for name, kind in {
        "ppo": PPOSettings, "warmup.train": TrainSettings, "reward_model.train": RewardSettings,
        "supervised.sampling": SamplingSettings, "adapter": AdapterSettings, "supervised": RevisionSettings,
    }.items()
    for key, field in kind.model_fields.items()
    if field.annotation in (int, float, int | None, float | None)
]  # fmt: skip


@pytest.mark.parametrize(("part", "key"), NUMBERS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "true", "abc", "[]", "-1e30"])
def test_every_number_of_a_recipe_is_finite_and_a_number(part: str, key: str, value: str) -> None:
    set_key, given = assignment(f"{part}.{key}={value}")
    assert set_key == f"{part}.{key}"
    with pytest.raises(InputError, match=rf"^--set {part}\.{key}: ") as error:
        load_recipe("tiny", {set_key: given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["ppo.updates", "=3", "a=[1, 2", "a=*x", "a=!!int 3", "a=\x00", "a={b: 1, b: 2}", ""])
def test_a_wrong_override_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^--set ") as error:
        assignment(text)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=25)
@given(texts, texts, st.floats(0, 1, exclude_min=True))
def test_what_a_run_writes_down_reads_back_the_same(name: str, system: str, rate: float) -> None:
    recipe = load_recipe("tiny", {"ppo.learning_rate": rate}).model_copy(update={"name": name, "system": system})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
        assert load_recipe(str(path)) == recipe
