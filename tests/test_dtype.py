"""`dtype: auto`: decided once, for generation and for training apart, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from solon.errors import InputError
from solon.models import dtype
from solon.recipes.pipeline import resolved
from solon.recipes.recipe import Recipe
from solon.reinforcement import reward
from solon.runs.common import dump_recipe


@pytest.fixture(autouse=True)
def forget() -> None:
    dtype._decide.cache_clear()


@pytest.mark.parametrize(("bfloat16", "chosen"), [(0.5, "bfloat16"), (0.95, "float32"), (2.0, "float32")])
def test_bfloat16_is_taken_where_it_is_clearly_faster_and_that_is_said(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bfloat16: float, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dtype, "products_are_fast", lambda: True)
    monkeypatch.setattr(dtype, "time_work", lambda where, work, kind: 1.0 if kind == torch.float32 else bfloat16)
    assert dtype.decide(tiny, "training") == chosen
    assert f"dtype for training: {chosen}" in capsys.readouterr().err


@pytest.mark.parametrize("work", ["generation", "training"])
def test_what_is_timed_runs_in_both_dtypes(tiny: str, work: dtype.Work) -> None:
    assert all(0 < dtype.time_work(tiny, work, kind) < 60 for kind in dtype.NAMES.values())


def test_a_run_decides_each_once_and_keeps_both(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = {"generation": "bfloat16", "training": "float32"}
    monkeypatch.setattr("solon.recipes.pipeline.decide", lambda where, work: faster[work])
    recipe = Recipe(name="r", model=tiny)
    first = resolved(recipe, tmp_path)
    assert (first.dtype, first.learning_dtype) == ("bfloat16", "float32")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(first))
    faster.update(generation="float32", training="bfloat16")
    assert resolved(recipe, tmp_path) == first
    given = resolved(recipe.model_copy(update={"dtype": "float32"}), tmp_path)
    assert (given.dtype, given.learning_dtype) == ("float32", "float32")


def test_a_run_of_an_older_solon_is_not_continued_with_settings_of_another_section(tiny: str, tmp_path: Path) -> None:
    recipe = Recipe(name="r", model=tiny, dtype="float32", algorithm="grpo")
    written = dump_recipe(recipe)
    (tmp_path / "recipe.yaml").write_text(written)
    assert resolved(recipe, tmp_path).algorithm == "grpo"
    old = written[: written.index("\ngrpo:")] + "\n" + written[written.index("\nppo:") + 1 :]  # grpo had no section
    (tmp_path / "recipe.yaml").write_text(old)
    with pytest.raises(InputError, match="took the settings of grpo from the section ppo"):
        resolved(recipe, tmp_path)


def test_a_reward_is_loaded_once_per_dtype_in_training_and_in_the_evaluation(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Model:
        def unfit(self, chat: object) -> None: ...
        def score(self, chats: list) -> list[float]:
            return [0.0 for _ in chats]

    monkeypatch.setattr(reward.RewardModel, "load", lambda where, dtype: (loaded.append(dtype), Model())[1])
    two = reward.Reward.of_model(tiny, "float32", "bfloat16")
    assert [two.score([()]), two.score([()]), two.measure([()])] == [[0.0]] * 3 and loaded == ["bfloat16", "float32"]
    two.release()
    assert two.measure([()]) == [0.0] and loaded == ["bfloat16", "float32", "float32"]
    one = reward.Reward.of_model(tiny, "float32")
    assert one.score([()]) == one.measure([()]) and len(loaded) == 4
