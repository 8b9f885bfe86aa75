"""No model with a number that is not finite is written; training goes back to the last weights that were good."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from solon.errors import Diverged
from solon.models.settings import AdapterSettings
from solon.records import Comparison, Prompt, SFTExample, assistant, user
from solon.training.finite import LastGood
from solon.training.loop import fit
from solon.training.saving import save_merged
from solon.training.settings import TrainSettings

FAR = 1e30  # a learning rate after which a step of AdamW leaves weights whose products overflow
# Beyond what the settings take: it stands for whatever else makes a training overflow.
ADAPTER = AdapterSettings(rank=2, alpha=4)


def finite(where: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(torch.isfinite(t).all()) for t in load_file(where / "model.safetensors").values())


def test_training_goes_back_to_the_last_good_weights() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0]))
    seen: list[float] = []

    def loss(batch: Any) -> torch.Tensor:
        seen.append(w.item())
        return w.sum() * (math.inf if len(seen) == 4 else 1.0)

    settings = TrainSettings(epochs=1, batch_size=1, learning_rate=0.1)
    made = fit(range(8), loss, [{"params": [w]}], settings=settings, tokens=lambda _: 1, seed=0, progress=None)
    assert len(made.values) == 3 and "3 steps" in str(made.stopped)
    assert w.item() == seen[2] != seen[3]  # where the loss and the gradient were last finite


def test_weights_that_the_last_step_ruined_are_not_kept() -> None:
    w = torch.nn.Parameter(torch.tensor([3.3e38]))
    settings = TrainSettings(epochs=1, batch_size=1).model_copy(update={"learning_rate": 2e37})
    made = fit([0], lambda _: -w.sum(), [{"params": [w]}], settings=settings, tokens=lambda _: 1, seed=0, progress=None)
    assert made.stopped and w.item() == pytest.approx(3.3e38)


def test_nothing_is_kept_where_the_first_loss_is_not_finite() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0]))
    settings = TrainSettings(epochs=1, batch_size=1, learning_rate=0.1)
    with pytest.raises(Diverged, match="first loss"):
        fit(range(2), lambda _: w.sum() * math.nan, [{"params": [w]}], settings=settings, tokens=lambda _: 1, seed=0, progress=None)  # fmt: skip


def test_a_gradient_is_looked_at_and_not_the_loss_alone() -> None:
    w = torch.nn.Parameter(torch.zeros(1))
    good = LastGood([w])
    w.grad = torch.tensor([math.inf])
    with pytest.raises(Diverged, match="gradient"):
        good.check(1.0)
    w.grad = torch.ones(1)
    assert good.check(1.0)


def test_no_weights_that_are_not_finite_are_written(tiny: str, tmp_path: Path) -> None:
    from solon.models.weights import load_causal_lm

    model, tokenizer = load_causal_lm(tiny, dtype="float32")
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(Diverged, match=r"model\.norm\.weight"):
        save_merged(model, tokenizer, tmp_path / "out", base=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_fine_tuning_that_overflows_ends_with_finite_weights(tiny: str, tmp_path: Path, whole: bool) -> None:
    from solon.supervised.sft import sft

    rows = [SFTExample(messages=(user("hi"), assistant(f"word {n}")), id=str(n)) for n in range(4)]
    settings = TrainSettings(epochs=2, batch_size=1).model_copy(update={"learning_rate": FAR})
    out = tmp_path / "out"
    told = sft(rows, tiny, out, settings=settings, adapter=None if whole else ADAPTER, system=None, dtype="float32")
    assert finite(out) and told["stopped"] and math.isfinite(told["loss_last"])


def comparisons() -> list[Comparison]:
    return [
        Comparison(id=str(n), prompt=(user("hi"),), chosen=(assistant(f"good {n}"),), rejected=(assistant("bad"),), label=1.0)
        for n in range(6)
    ]  # fmt: skip


def test_a_reward_model_that_overflows_has_finite_weights_or_is_not_written(tiny: str, tmp_path: Path) -> None:
    from solon.reinforcement.reward_model import RewardModel
    from solon.reinforcement.reward_training import train_reward_model
    from solon.reinforcement.settings import RewardSettings

    out = tmp_path / "out"
    settings = RewardSettings(epochs=2, batch_size=1).model_copy(update={"learning_rate": FAR})
    try:
        told = train_reward_model(
            comparisons(), tiny, out, settings=settings, adapter=ADAPTER, system=None, reference=[], dtype="float32"
        )
    except Diverged:
        assert not out.exists()
        return
    assert finite(out) and math.isfinite(told["loss_last"])
    assert all(map(math.isfinite, RewardModel.load(str(out), "float32").score([(user("hi"), assistant("yes"))])))


def test_ppo_that_overflows_writes_the_last_finite_policy(tiny: str, tmp_path: Path) -> None:
    from solon.reinforcement.settings import PPOSettings
    from solon.reinforcement.trainer import ppo

    prompts = [Prompt(prompt=(user(f"hi {n}"),)) for n in range(4)]
    settings = PPOSettings(updates=3, rollouts=4, minibatch=2, epochs=1, max_tokens=6).model_copy(
        update={"learning_rate": FAR}
    )
    out, kept = tmp_path / "out", tmp_path / "kept"
    made = list(
        ppo(prompts, tiny, lambda chats: [float(len(c[-1].content)) for c in chats], out, settings=settings,
            adapter=ADAPTER, system=None, dtype="float32", checkpoint=kept)
    )  # fmt: skip
    assert finite(out) and made[-1].meta["stopped"]
    assert not [
        (m.update, k, v) for m in made for k, v in m.numbers().items() if "rollouts" not in k and not math.isfinite(v)
    ]


def test_a_reward_that_is_no_number_ends_ppo_before_anything_is_written(tiny: str, tmp_path: Path) -> None:
    from solon.reinforcement.settings import PPOSettings
    from solon.reinforcement.trainer import ppo

    settings = PPOSettings(updates=1, rollouts=2, minibatch=2, epochs=1, max_tokens=4)
    with pytest.raises(Diverged):
        list(ppo([Prompt(prompt=(user("hi"),))], tiny, lambda chats: [math.nan] * len(chats), tmp_path / "out",
                 settings=settings, adapter=ADAPTER, system=None, dtype="float32"))  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_trl_s_algorithms_end_with_finite_weights_too(tiny: str, tmp_path: Path, algorithm: str) -> None:
    from solon.reinforcement.settings import DPOSettings, GRPOSettings
    from solon.reinforcement.trl_algorithms import train_dpo, train_online

    prompts = [Prompt(prompt=(user(f"hi {n}"),)) for n in range(2)]
    out, given = tmp_path / "out", {"adapter": ADAPTER, "system": None, "dtype": "float32"}
    far = {"learning_rate": FAR}
    online = GRPOSettings(
        max_steps=4, generation_batch_size=4, num_generations=2, per_device_train_batch_size=4, max_completion_length=4
    ).model_copy(update=far)
    dpo = DPOSettings(num_train_epochs=2, per_device_train_batch_size=4).model_copy(update=far)
    try:
        if algorithm == "dpo":
            train_dpo(comparisons(), tiny, out, settings=dpo, **given)  # type: ignore[arg-type]
        else:
            train_online(algorithm, prompts, tiny, lambda chats: [float(len(c[-1].content)) for c in chats], out,
                         settings=online, **given)  # type: ignore[arg-type]  # fmt: skip
    except Diverged:
        assert not out.exists()
    else:
        assert finite(out)
    assert not (tmp_path / ".out.trainer").exists()  # the trainer's scratch folder


@pytest.mark.parametrize("fails", [False, True])
def test_the_scratch_folder_of_a_trainer_is_removed_where_it_is_empty(tmp_path: Path, fails: bool) -> None:
    from types import SimpleNamespace

    from solon.training.trl_trainers import run_trainer

    def train() -> None:
        if fails:
            raise InterruptedError

    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / "full" / "notes").touch()
        trainer = SimpleNamespace(
            model=torch.nn.Linear(1, 1), train=train, args=SimpleNamespace(output_dir=str(tmp_path / name)),
            add_callback=lambda _: None, callback_handler=SimpleNamespace(callbacks=[]),
        )  # fmt: skip
        with pytest.raises(InterruptedError) if fails else nullcontext():
            run_trainer(trainer)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_trainer_uses_one_gpu_where_its_process_sees_several(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from solon.training.trl_trainers import trainer_config

    def four_gpus(**arguments: Any) -> TrainingArguments:
        config = TrainingArguments(**arguments)
        config._n_gpu = 4
        return config

    assert trainer_config(TrainingArguments, tmp_path / "m", 0).n_gpu <= 1
    config = trainer_config(four_gpus, tmp_path / "m", 0, per_device_train_batch_size=2)
    assert config.n_gpu == 1 and config.train_batch_size == 2  # with four: 8, on a DataParallel model
