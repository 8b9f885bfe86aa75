"""Learning is real: the parts that train move towards what they are rewarded for, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from solon.constitution import load_constitution
from solon.engines import ScoreRequest, ScriptedEngine
from solon.feedback.rating import JudgeReward
from solon.records import Chat, Comparison, Prompt, SFTExample, assistant, user
from solon.reinforcement.reward_model import (
    RewardModel,
    accuracy,
    preference_loss,
    score_pairs,
    train_reward_model,
)
from solon.reinforcement.trainer import PPOSettings, ppo
from solon.supervised.sft import IGNORE, encode, sft
from solon.training import AdapterSettings, TrainSettings, fit

ADAPTER = AdapterSettings(rank=8, alpha=16)
PROMPTS = [Prompt(prompt=(user(f"question {i}"),), id=f"p{i}") for i in range(8)]


def has_e(chats: Sequence[Chat]) -> list[float]:
    """Share of letters that are "e": a reward that needs no model."""
    return [10.0 * c[-1].content.count("e") / max(1, len(c[-1].content)) for c in chats]


def train(tiny: str, out: Path, reward: Callable[[Sequence[Chat]], Sequence[float]]) -> list[float]:
    settings = PPOSettings(
        updates=10,
        rollouts=128,
        epochs=4,
        minibatch=64,
        learning_rate=2e-2,
        max_tokens=8,
        temperature=1.0,
        kl_coefficient=0.0,
        kl_target=None,
        kl_bound=1e9,
        missing_end_penalty=0.0,
    )
    seen: list[float] = []

    def watched(chats: Sequence[Chat]) -> Sequence[float]:
        seen.append(sum(has_e(chats)) / len(chats))
        return reward(chats)

    list(
        ppo(
            PROMPTS,
            tiny,
            watched,
            out,
            settings=settings,
            adapter=AdapterSettings(rank=16, alpha=32),
            system=None,
            dtype="float32",
        )
    )
    return seen


def test_ppo_climbs_a_reward_and_descends_its_negative(tiny: str, tmp_path: Path) -> None:
    up = train(tiny, tmp_path / "up", has_e)
    down = train(tiny, tmp_path / "down", lambda chats: [-x for x in has_e(chats)])
    assert up[0] == down[0]  # the same seeds before the first step
    # Seen over two seeds: 1.0 to 1.1 against 0.6 to 0.7, from 0.75 to 0.9; the mean of three updates of an
    # untrained policy varies by about 0.05.
    assert sum(up[-3:]) / 3 > sum(down[-3:]) / 3 + 0.25


def test_ppo_climbs_a_judge_s_rating_with_no_reward_model(tiny: str, tmp_path: Path) -> None:
    """Direct RLAIF: the judge rates from 1 to 10, and its expected rating is the reward."""

    def prefers(sign: int) -> JudgeReward:
        def prefer(request: ScoreRequest) -> list[float]:
            assert request.question is not None
            [found] = has_e([(assistant(request.question.state["response"]),)])
            best = 5.5 + sign * (found - 0.5) * 9
            return [-abs(n - best) - 1 for n in range(1, 11)]

        return JudgeReward(ScriptedEngine(prefer=prefer), load_constitution("simple"))

    up = train(tiny, tmp_path / "up", prefers(1).score)
    down = train(tiny, tmp_path / "down", prefers(-1).score)
    assert up[0] == down[0]
    assert sum(up[-3:]) / 3 > sum(down[-3:]) / 3 + 0.25


def test_ppo_with_a_constant_reward_does_not_move(tiny: str, tmp_path: Path) -> None:
    settings = PPOSettings(
        updates=3, rollouts=8, minibatch=4, learning_rate=3e-3, max_tokens=8, kl_coefficient=0.0, kl_target=None,
        missing_end_penalty=0.0,
    )  # fmt: skip
    history = list(
        ppo(PROMPTS, tiny, lambda chats: [0.0] * len(chats), tmp_path / "still", settings=settings, adapter=ADAPTER,
            system=None, dtype="float32")
    )  # fmt: skip
    assert max(abs(h.kl_nats) for h in history) < 1e-4


def test_first_ratio_is_one(tiny: str, tmp_path: Path) -> None:
    settings = PPOSettings(updates=2, rollouts=8, minibatch=4, max_tokens=8, learning_rate=3e-3)
    for h in ppo(
        PROMPTS, tiny, has_e, tmp_path / "m", settings=settings, adapter=ADAPTER, system=None, dtype="float32"
    ):
        assert abs(h.meta["first_ratio"] - 1) < 1e-4  # float32 in batches of another size


def test_a_resumed_ppo_takes_the_same_path(tiny: str, tmp_path: Path) -> None:
    settings = PPOSettings(updates=4, rollouts=8, minibatch=4, max_tokens=8, learning_rate=3e-3)

    def start(name: str, updates: int | None = None):
        steps = ppo(PROMPTS, tiny, has_e, tmp_path / name, settings=settings, adapter=ADAPTER, system=None,
                    dtype="float32", checkpoint=tmp_path / f"{name}.checkpoint")  # fmt: skip
        return [next(steps) for _ in range(updates)] if updates else list(steps)

    whole = start("whole")
    begun = start("killed", updates=2)  # the generator is dropped after two updates, as a kill would
    resumed = start("killed")
    assert [h.to_json() for h in begun + resumed] == [h.to_json() for h in whole]
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "killed"))
    assert one == two


def comparisons(n: int = 48) -> list[Comparison]:
    """The response with the word "good" is better."""
    return [
        Comparison(
            id=str(i),
            prompt=(user(f"question {i}"),),
            chosen=(assistant(f"{i} good answer {i % 7}"),),
            rejected=(assistant(f"{i} poor answer {i % 5}"),),
            label=0.95,
        )
        for i in range(n)
    ]


def test_reward_model_learns_and_its_labels_can_be_turned_round(tiny: str, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=8, batch_size=8, learning_rate=1e-2)
    held = comparisons(64)[48:]
    found = {}
    for name, label in (("plain", 0.95), ("turned", 0.05), ("tie", 0.5)):
        rows = [c.model_copy(update={"label": label}) for c in comparisons()]
        train_reward_model(rows, tiny, tmp_path / name, settings=settings, adapter=ADAPTER, system=None, reference=[],
                           dtype="float32")  # fmt: skip
        chosen, rejected = score_pairs(RewardModel.load(str(tmp_path / name), "float32"), held)
        found[name] = accuracy(chosen, rejected), sum(chosen) - sum(rejected)
    assert found["plain"][0] > 0.9
    assert found["turned"][0] < 0.1
    assert abs(found["tie"][1]) < 0.05 * abs(found["plain"][1])  # a 0.5 teaches no preference


def test_preference_loss_is_least_at_the_label() -> None:
    label = torch.tensor([0.8])
    best = torch.logit(label)
    losses = [preference_loss(best + shift, torch.zeros(1), label).item() for shift in (-0.1, 0.0, 0.1)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_a_batch_in_parts_steps_like_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(limit: int) -> tuple[list[float], torch.Tensor]:
        weight = torch.nn.Parameter(torch.zeros(3))
        rows = [(torch.randn(3, generator=torch.Generator().manual_seed(i)), float(i % 2)) for i in range(14)]

        def loss(part: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
            scores = torch.stack([x for x, _ in part]) @ weight
            return torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.tensor([y for _, y in part]))

        monkeypatch.setattr("solon.training.TOKENS_AT_ONCE", limit)
        losses = fit(
            rows,
            loss,
            [{"params": [weight]}],
            settings=TrainSettings(epochs=2, batch_size=5, learning_rate=0.1),
            length=lambda row: 10,
            seed=0,
            progress=None,
        )
        return losses, weight.detach()

    whole, parts = trained(10**6), trained(20)  # all rows of a batch at once; two at once
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    assert torch.allclose(whole[1], parts[1], rtol=1e-4)


def test_reward_scores_do_not_depend_on_the_batch(tiny: str, tmp_path: Path) -> None:
    train_reward_model(comparisons(8), tiny, tmp_path / "rm", settings=TrainSettings(epochs=1), adapter=ADAPTER,
                       system=None, reference=[], dtype="float32")  # fmt: skip
    rewards = RewardModel.load(str(tmp_path / "rm"), "float32")
    chats = [(user("q"), assistant("word " * n)) for n in (1, 5, 40)]
    together, alone = rewards.score(chats), [rewards.score([c])[0] for c in chats]
    assert together == pytest.approx(alone, abs=1e-4)  # float32, other shapes
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "rm"))
    ids = torch.tensor([rewards.ids(chats[1])])
    assert model(ids).logits.item() == pytest.approx(rewards.raw_scores([chats[1]])[0], abs=1e-4)


def test_sft_teaches_the_answer_and_the_stop(tiny: str, tmp_path: Path) -> None:
    from solon.engines import GenerationRequest, Sampling
    from solon.engines.local import LocalEngine

    examples = [SFTExample(id=str(i), messages=(user("say it"), assistant("yes it is"))) for i in range(64)]
    settings = TrainSettings(epochs=15, batch_size=8, learning_rate=1e-2)
    result = sft(examples, tiny, tmp_path / "m", settings=settings, adapter=None, system=None, dtype="float32")
    assert result["loss_last"] < 0.2 * result["loss_first"]
    engine = LocalEngine.load(str(tmp_path / "m"), dtype="float32", system=None)
    [said] = engine.generate([GenerationRequest("a", (user("say it"),))], Sampling(16, temperature=0))
    assert (said.text, said.ended) == ("yes it is", True)


def test_labels_hold_the_answer_and_its_end_and_nothing_else(tiny: str) -> None:
    from solon.engines.weights import load_tokenizer

    tokenizer = load_tokenizer(tiny)
    example = SFTExample(messages=(user("hello"), assistant("one"), user("more"), assistant("two")), id="x")
    row = encode(tokenizer, example, system="be kind", max_length=512)
    learned = [t for t in row["labels"] if t != IGNORE]
    assert tokenizer.decode(learned) == "two<|im_end|>"
    both = encode(tokenizer, example.model_copy(update={"train_turns": (1, 3)}), system="be kind", max_length=512)
    assert tokenizer.decode([t for t in both["labels"] if t != IGNORE]) == "one<|im_end|>two<|im_end|>"


def test_passes_that_start_above_the_frozen_blocks_are_the_same(tiny: str) -> None:
    from solon.engines.weights import load_causal_lm
    from solon.reinforcement.frozen import lowest_trained_block, states_entering
    from solon.reinforcement.trainer import Batch, evaluate_tokens
    from solon.training import add_adapters

    torch.manual_seed(0)
    policy = add_adapters(load_causal_lm(tiny, dtype="float32")[0], AdapterSettings(rank=4, alpha=8, layers=1)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    block = lowest_trained_block(policy)
    assert block == 1  # of two
    rollouts = Batch([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad=0, device=torch.device("cpu"))
    rows = torch.tensor([1, 0])

    def passes() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        policy.zero_grad()
        logprobs, _, _ = evaluate_tokens(policy, rollouts, rows, 0.7)
        logprobs.sum().backward()
        return logprobs.detach(), [p.grad for p in policy.parameters() if p.requires_grad]

    whole, gradients = passes()
    with torch.no_grad(), policy.disable_adapter(), states_entering(policy, block) as entering:
        evaluate_tokens(policy, rollouts, torch.tensor([0, 1]), 0.7)
    rollouts.keep(policy, block, torch.cat(entering))
    assert rollouts.entering is not None  # the architecture takes it
    short, again = passes()
    assert torch.allclose(whole, short, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, again, strict=True))
    rollouts.entering = torch.zeros_like(rollouts.entering)
    assert not torch.allclose(whole, passes()[0], atol=1e-3)  # they were really used
