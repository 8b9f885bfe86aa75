"""Trainings on first tokens, rewards of beginnings, and a judge that is asked of each response by itself."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from solon.constitution import load_constitution
from solon.data import read_comparisons
from solon.engines import ScoreRequest, ScriptedEngine
from solon.errors import InputError
from solon.feedback.feedback_model import measure_judge, train_feedback_model
from solon.feedback.questions import HHH, OPTIONS
from solon.feedback.settings import FeedbackTrainSettings, JudgeSettings
from solon.feedback.trust import Trust
from solon.models.passes import fast
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm
from solon.records import Comparison, Pair, Prompt, SFTExample, assistant, text_of, user
from solon.reinforcement import ppo as formulas
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.reward_training import beginnings_loss, preference_loss, train_reward_model
from solon.reinforcement.settings import PPOSettings, RewardSettings
from solon.reinforcement.trainer import ppo
from solon.supervised.sft import IGNORE, openings, sft
from solon.training.loop import fit, steps_of
from solon.training.settings import TrainSettings
from tests.asking import compare

ADAPTER = AdapterSettings(rank=8, alpha=16, layers=1)
RULES = load_constitution("simple")
PROMPTS = [Prompt(prompt=(user(f"question {i}"),), id=f"p{i}") for i in range(8)]


# --- first tokens --------------------------------------------------------------------------------------------


def test_an_opening_ends_after_the_first_tokens_of_the_answer() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [IGNORE, IGNORE, 3, 4, 5, 6]},
        {"input_ids": [1, 2, 3], "labels": [IGNORE, IGNORE, 3]},  # a short answer is its own opening
        {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE, 2, IGNORE, 4, 5]},  # two learned turns: the first one counts
    ]
    cut = [4, 3, 3]
    assert openings(rows, 2) == [{k: v[:n] for k, v in row.items()} for row, n in zip(rows, cut, strict=True)]


def fine_tuned(tiny: str, out: Path, answers: list[str], **settings: Any) -> dict[str, Any]:
    examples = [
        SFTExample(id=str(i), messages=(user(f"question {i}"), assistant(answer))) for i, answer in enumerate(answers)
    ]
    how = TrainSettings(**{"batch_size": 4, "learning_rate": 1e-2, "epochs": 1, **settings})
    return sft(examples, tiny, out, settings=how, adapter=ADAPTER, system=None, dtype="float32")


def test_first_tokens_are_learned_before_whole_answers_and_counted(tiny: str, tmp_path: Path) -> None:
    answers = ["yes it is a good thing to do", "no it is a bad thing to do"] * 8
    seen: list[tuple[int, int]] = []
    examples = [SFTExample(id=str(i), messages=(user("q"), assistant(a))) for i, a in enumerate(answers)]
    settings = TrainSettings(batch_size=4, learning_rate=1e-2, epochs=1, opening_tokens=2, opening_batch_size=8)
    made = sft(examples, tiny, tmp_path / "m", settings=settings, adapter=ADAPTER, system=None, dtype="float32",
               progress=lambda step, total, _: seen.append((step, total)))  # fmt: skip
    assert made["steps"] == 3 * 2 + 4 and seen == [(n + 1, 10) for n in range(10)]
    assert made["opening"]["loss_last"] < made["opening"]["loss_first"]
    assert "opening" not in fine_tuned(tiny, tmp_path / "n", answers)


def test_an_example_with_several_turns_is_learned_whole_or_not_at_all(tiny: str, tmp_path: Path) -> None:
    """What the training did not meet is not told as learned."""
    turns = (user("q"), assistant("a"), user("criticise"), assistant("it is bad"), user("revise"), assistant("b"))
    chains = [SFTExample(id=f"chain-{i}", messages=turns, train_turns=(3, 5)) for i in range(8)]
    answers = [SFTExample(id=f"answer-{i}", messages=(user("q"), assistant("yes it is"))) for i in range(8)]

    def learned(examples: list[SFTExample]) -> tuple[dict[str, Any], list[str]]:
        told: list[SFTExample] = []
        settings = TrainSettings(batch_size=4, learning_rate=1e-2, epochs=0.25, opening_tokens=2, opening_epochs=1)
        made = sft(examples, tiny, tmp_path / "m", settings=settings, adapter=ADAPTER, system=None, dtype="float32",
                   learned=told.extend)  # fmt: skip
        assert made["examples"] == len(told)
        return made, [e.id for e in told]

    made, told = learned([*chains, *answers])
    assert made["steps"] == 8 / 4 + 4 / 4  # the openings of the answers, and a quarter of all examples whole
    assert {a.id for a in answers} < {*told} and 8 < len(told) < 12
    made, told = learned(chains)
    assert made["steps"] == 1 and "opening" not in made and len(told) == 2


def test_of_opening_examples_the_first_tokens_alone_are_learned(tiny: str, tmp_path: Path) -> None:
    def example(n: int, answer: str) -> SFTExample:
        return SFTExample(id=answer.split()[0] + str(n), messages=(user(f"question {n}"), assistant(answer)))

    whole = [example(n, "yes it is a good thing to do") for n in range(8)]
    short = [example(n, "no it is a bad thing to do") for n in range(8)]
    long = [example(n, "no it is a bad thing to do but " + "very " * 40 + "late") for n in range(8)]

    def learned(opening_examples: list[SFTExample], opening_tokens: int = 2) -> tuple[dict[str, Any], list[str]]:
        told: list[SFTExample] = []
        settings = TrainSettings(
            batch_size=4, learning_rate=1e-2, epochs=1, opening_tokens=opening_tokens, opening_epochs=1
        )
        made = sft(whole, tiny, tmp_path / "m", settings=settings, adapter=ADAPTER, system=None, dtype="float32",
                   learned=told.extend, opening_examples=opening_examples)  # fmt: skip
        return made, [e.id for e in told]

    made, told = learned(short)
    assert made["steps"] == 16 / 4 + 8 / 4 and told == [e.id for e in [*whole, *short]]
    same = {k: made[k] for k in ("tokens", "learned_tokens", "loss_first", "loss_last")}
    assert {k: learned(long)[0][k] for k in same} == same  # nothing after the first tokens is met
    made, told = learned(short, opening_tokens=0)
    assert made["steps"] == 8 / 4 and told == [e.id for e in whole]


@pytest.mark.parametrize(("epochs", "learned"), [(0.5, 8), (0.3, 5), (1, 16), (1.5, 24), (0.001, 1), (2.0, 32)])
def test_a_part_of_an_epoch_goes_over_a_random_part_of_the_rows(
    tiny: str, tmp_path: Path, epochs: float, learned: int
) -> None:
    settings, seen = TrainSettings(epochs=epochs, batch_size=2, learning_rate=0.1), list[int]()
    w = torch.nn.Parameter(torch.zeros(()))

    def loss(rows: Any) -> torch.Tensor:
        seen.extend(rows)
        return (w - 1) ** 2

    made = fit(range(16), loss, [{"params": [w]}], settings=settings, tokens=lambda _: 1, seed=0, progress=None)
    steps = -(-learned // 2)
    assert steps_of(settings, range(16)) == made.steps == steps and len(seen) == learned
    assert max(Counter(seen).values()) - (min(Counter(seen).values()) if learned >= 16 else 0) <= 1
    answers = ["yes " * (1 + i % 8) for i in range(16)]  # of many lengths: the part must not be the longest ones
    told: list[SFTExample] = []
    examples = [SFTExample(id=str(i), messages=(user("q"), assistant(a))) for i, a in enumerate(answers)]
    again = sft(
        examples,
        tiny,
        tmp_path / "m",
        settings=settings,
        adapter=ADAPTER,
        system=None,
        dtype="float32",
        learned=told.extend,
    )
    assert again["steps"] == steps and again["examples"] == len(told) == min(16, learned)
    lengths = [a.count("yes") for a in answers]
    if learned == 8:
        assert sorted(seen) != list(range(8))  # not the first rows: files are often sorted
        assert sorted(lengths[int(e.id)] for e in told) != sorted(lengths)[8:]


def test_stored_states_change_nothing_that_is_learned(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks below the adapters are computed once; a wrong or stale state would teach another model."""
    answers = ["yes it is", "no it is not", "that depends on the day"] * 4
    settings = {"epochs": 2, "opening_tokens": 2, "opening_epochs": 2}
    stored = fine_tuned(tiny, tmp_path / "stored", answers, **settings)
    monkeypatch.setattr("solon.models.passes.STORED_BYTES", 0)
    computed = fine_tuned(tiny, tmp_path / "computed", answers, **settings)
    one, two = (
        load_causal_lm(str(tmp_path / name), dtype="float32")[0].state_dict() for name in ("stored", "computed")
    )
    assert stored["loss_last"] == pytest.approx(computed["loss_last"], abs=1e-3)
    assert all(torch.allclose(one[name], two[name], atol=2e-3) for name in one)


def test_a_reward_model_learns_the_same_with_and_without_stored_states(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RewardSettings(batch_size=4, learning_rate=1e-3, beginnings=0.5, opening_tokens=3, opening_epochs=2)
    served: list[Any] = []
    original = RewardModel.read
    monkeypatch.setattr(RewardModel, "read", lambda self, *a: served.append(self.lower) or original(self, *a))  # type: ignore[func-returns-value]
    stored = reward_model(tiny, tmp_path / "stored", settings)
    assert not fast() or served[0] is not None  # stored states were really used
    monkeypatch.setattr("solon.models.passes.STORED_BYTES", 0)
    computed = reward_model(tiny, tmp_path / "computed", settings)
    chats = [(user("question 1"), assistant(text)) for text in ("good answer", "poor", "good good good")]
    assert stored.score(chats) == pytest.approx(computed.score(chats), abs=1e-2)


# --- beginnings ----------------------------------------------------------------------------------------------


def comparisons(n: int) -> list[Comparison]:
    return [
        Comparison(id=f"c{i}", prompt=(user(f"question {i}"),), chosen=(assistant("good answer to this " * 2),),
                   rejected=(assistant("bad answer to this"),), label=0.9)
        for i in range(n)
    ]  # fmt: skip


def reward_model(tiny: str, out: Path, settings: RewardSettings, system: str | None = None) -> RewardModel:
    rows = comparisons(16)
    reference = [(*c.prompt, *side) for c in rows[:4] for side in (c.chosen, c.rejected)]
    train_reward_model(rows, tiny, out, settings=settings, adapter=ADAPTER, system=system, reference=reference,
                       dtype="float32")  # fmt: skip
    return RewardModel.load(str(out), "float32")


def test_the_loss_of_beginnings_is_the_preference_loss_after_each_token() -> None:
    chosen, rejected = torch.tensor([9.0, 1.0, 2.0]), torch.tensor([9.0, 0.5])
    label, weight = torch.tensor([0.8]), torch.ones(1)
    found = beginnings_loss([chosen], [rejected], [1], label, weight)
    pairs = [(1.0, 0.5), (2.0, 0.5)]  # the shared first token is not compared; the ended response keeps its score
    expected = [preference_loss(torch.tensor([a]), torch.tensor([b]), label).item() for a, b in pairs]
    assert found.item() == pytest.approx(sum(expected) / 2)
    assert beginnings_loss([rejected], [rejected], [2], label, weight).item() == 0  # equal responses teach nothing


def test_a_reward_model_that_learns_beginnings_tells_two_answers_apart_after_their_first_word(
    tiny: str, tmp_path: Path
) -> None:
    def gap(name: str, **settings: Any) -> float:
        """How much higher the good response scores after its first token that differs, in sd."""
        how = RewardSettings(epochs=4, batch_size=8, learning_rate=1e-2, **settings)
        rewards = reward_model(tiny, tmp_path / name, how)
        rows = [rewards.ids_and_start((user("question 3"), assistant(t))) for t in ("good answer to", "bad answer to")]
        good, bad = rewards.of_beginnings([ids for ids, _ in rows], [start for _, start in rows])
        return good[0] - bad[0]

    assert gap("beginnings", beginnings=0.5) > gap("whole") + 0.2


def test_the_last_beginning_is_the_whole_response(tiny: str, tmp_path: Path) -> None:
    rewards = reward_model(tiny, tmp_path / "rm", RewardSettings(batch_size=8, beginnings=0.5))
    chat = (user("question 1"), assistant("a good answer"))
    ids, start = rewards.ids_and_start(chat)
    [read] = rewards.of_beginnings([ids], [start])
    assert len(read) == len(ids) - start and read[-1] == pytest.approx(rewards.score([chat])[0], abs=1e-4)


def test_a_token_s_advantage_is_what_it_changes_in_the_score() -> None:
    """With lambda 0 each token gets its own change; with lambda 1 all that follows: the score minus the baseline."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    read = torch.randn(4, 4, generator=generator) * mask
    last = mask.sum(-1).long() - 1
    scores = read[torch.arange(4), last]
    base = formulas.baseline(scores, 2)
    assert base[:2].tolist() == pytest.approx([scores[1].item(), scores[0].item()], abs=1e-6)
    assert torch.allclose(scores - base, formulas.centred(scores, 2))
    values = formulas.values_of_beginnings(read, base, mask)
    rewards = formulas.token_rewards(scores - base, torch.zeros(4, 4), mask, 0.0)
    own, _ = formulas.advantages_and_returns(rewards, values, mask, lam=0.0)
    before = torch.cat([base.unsqueeze(-1), read[:, :-1]], -1)
    assert torch.allclose(own, (read - before) * mask, atol=1e-6)
    every, _ = formulas.advantages_and_returns(rewards, values, mask, lam=1.0)
    assert torch.allclose(every[:, 0], scores - base, atol=1e-6)


def test_a_penalty_of_the_score_is_no_advantage_of_the_first_tokens() -> None:
    """All responses lose the penalty alike, so on average no token has an advantage: the baseline of beginnings has no penalty."""
    mask, read = torch.ones(4, 5), torch.zeros(4, 5)
    scores = torch.zeros(4) - 1.0  # every response was cut
    values = formulas.values_of_beginnings(read, formulas.baseline(read[:, -1], 2), mask)
    rewards = formulas.token_rewards(scores - formulas.baseline(scores, 2), torch.zeros(4, 5), mask, 0.0)
    advantages, _ = formulas.advantages_and_returns(rewards, values, mask, lam=0.9)
    assert advantages.abs().max() < 1e-6


def test_a_reward_model_of_whole_responses_gives_no_values(tiny: str, tmp_path: Path) -> None:
    reward_model(tiny, tmp_path / "rm", RewardSettings(batch_size=8))
    settings = PPOSettings(updates=1, rollouts=4, minibatch=4, max_tokens=4, value_start="beginnings")
    with pytest.raises(InputError, match="whole responses only"):
        list(ppo(PROMPTS, tiny, str(tmp_path / "rm"), tmp_path / "m", settings=settings, adapter=ADAPTER, system=None,
                 dtype="float32"))  # fmt: skip


def test_ppo_takes_the_reward_of_beginnings_as_values(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward_model(tiny, tmp_path / "rm", RewardSettings(batch_size=8, beginnings=0.5, epochs=3, learning_rate=1e-2))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = formulas.values_of_beginnings

    def watched(beginnings: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append((beginnings, mask))
        return original(beginnings, base, mask)

    monkeypatch.setattr(formulas, "values_of_beginnings", watched)

    def run(name: str, start: Any, system: str | None = None) -> Any:
        settings = PPOSettings(
            updates=1, rollouts=16, minibatch=8, max_tokens=6, value_start=start, responses_per_prompt=2
        )
        [update] = ppo(PROMPTS, tiny, str(tmp_path / "rm"), tmp_path / name, settings=settings, adapter=ADAPTER,
                       system=system, dtype="float32")  # fmt: skip
        return update

    known = run("known", "beginnings")
    [(beginnings, mask)] = seen
    last = beginnings.gather(1, mask.sum(-1, keepdim=True).long() - 1)
    assert last.mean().item() == pytest.approx(known.reward, abs=1e-5)  # a response earns what its last token says
    run("unknown", "zero")
    assert len(seen) == 1
    with pytest.raises(InputError, match="same system message"):
        run("other", "beginnings", system="be brief")


# --- each response by itself ---------------------------------------------------------------------------------


def goodness(request: ScoreRequest) -> tuple[float, float]:
    """Log-probabilities of yes and no: the number that stands in the answer."""
    assert request.continuations == OPTIONS and request.chat[-2].role == "assistant"
    return float(request.chat[-2].content), 0.0


@pytest.mark.parametrize("first, second", [("2", "0.5"), ("-1", "3"), ("1", "1")])
def test_asked_of_each_response_the_label_is_the_difference_and_mirrors(first: str, second: str) -> None:
    engine, how = ScriptedEngine(prefer=goodness), JudgeSettings(ask="each")
    pairs = [Pair(id="p", prompt=(user("hi"),), responses=r) for r in ((first, second), (second, first))]
    one, two = (next(iter(compare([pair], engine, RULES, how))) for pair in pairs)
    expected = torch.tensor(abs(float(first) - float(second))).sigmoid().item()
    assert one.label == pytest.approx(expected) and two.label == pytest.approx(expected)
    if first != second:
        assert text_of(one.chosen) == text_of(two.chosen) == max(first, second, key=float)
    assert one.judgements[0].kind == "each"


def test_a_judge_without_an_order_has_no_share_of_contradictions() -> None:
    trust = Trust()
    pair = Pair(id="p", prompt=(user("hi"),), responses=("1", "0"), human=1.0)
    for comparison in compare([pair], ScriptedEngine(prefer=goodness), RULES, JudgeSettings(ask="each")):
        trust.add(comparison)
    summary = trust.summary()
    assert summary["position"]["contradictions"]["n"] == 0 and summary["calibration"]["accuracy"]["value"] == 1


@pytest.mark.parametrize("given", [{"rationales": 1}, {"few_shot": 2}])
def test_each_is_asked_plainly(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="ask: each asks without"):
        JudgeSettings(ask="each", **given)


def test_a_small_model_learns_to_judge_each_response(tiny: str, tmp_path: Path) -> None:
    """The better answers begin with a word that the others lack: openings are enough, and are learned first."""
    rng = random.Random(0)
    rows = [
        Comparison(id=str(i), prompt=(user(f"question {i}"),), label=1.0, source="helpful",
                   chosen=(assistant(f"yes {rng.randint(0, 99)} " * 3),), rejected=(assistant(f"never {rng.randint(0, 99)} " * 3),))
        for i in range(48)
    ]  # fmt: skip
    settings = FeedbackTrainSettings(epochs=1, batch_size=8, learning_rate=1e-2, opening_tokens=3, opening_epochs=3)
    made = train_feedback_model(rows[:32], RULES, tiny, tmp_path / "judge", question=HHH, settings=settings, adapter=None,
                                system=None, ask="each", dtype="float32")  # fmt: skip
    assert made["steps"] == 3 * 4 + 4
    trust = measure_judge(str(tmp_path / "judge"), rows[32:], RULES, system=None, dtype="float32", ask="each")
    assert trust["calibration"]["accuracy"]["value"] == 1.0 and trust["position"]["contradictions"]["n"] == 0


def test_the_shipped_comparisons_can_be_asked_of_each(tiny: str) -> None:
    from solon.feedback.feedback_model import encode
    from solon.models.weights import load_tokenizer

    tokenizer = load_tokenizer(tiny)
    [c] = read_comparisons("solon:comparisons-harmless")[:1]
    example = encode(tokenizer, c, RULES, HHH, None, ask="each", opening_tokens=4)
    assert example.opening is not None and len(example.opening.first) < len(example.first)
    text = tokenizer.decode(example.opening.first)
    assert text_of(c.prompt) in text and text_of(c.chosen) not in text and "is your last answer good" in text
