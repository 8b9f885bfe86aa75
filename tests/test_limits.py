"""A text beyond a model's context is left out and counted: never computed past, never cut."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from solon.engines.base import GenerationRequest, Sampling, ScoreRequest
from solon.engines.local import CACHED_TOKENS, LocalEngine
from solon.errors import InputError, Unfit
from solon.models.chat.limits import Limit, context_limit
from solon.models.settings import AdapterSettings
from solon.records import Comparison, Prompt, SFTExample, assistant, user
from solon.training.settings import TrainSettings

ADAPTER = AdapterSettings(rank=2, alpha=4)
LONG = "tea is a drink " * 150  # beyond 512 tokens, within 2,048
BEYOND = LONG * 16  # beyond the tiny model's 2,048


@pytest.fixture(scope="module")
def engine(tiny: str) -> LocalEngine:
    return LocalEngine.load(tiny, dtype="float32")


def config(**told: Any) -> Any:
    made = SimpleNamespace(**told)
    made.get_text_config = lambda: made
    return made


@pytest.mark.parametrize(
    ("told", "tokenizer", "limit"),
    [
        ({"max_position_embeddings": 2048}, 10**30, 2048),
        ({"max_position_embeddings": 32768}, 4096, 4096),
        ({"n_positions": 1024}, None, 1024),
        ({"max_position_embeddings": 8192, "sliding_window": 512}, None, 8192),  # a window does not limit
        # Positions that change for a whole pass, once one text is longer than what the model was first trained on.
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "longrope",
          "original_max_position_embeddings": 4096}}, None, 4096),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, None, 2048),
        ({}, 10**30, None),
        ({}, 512, 512),
        ({"max_position_embeddings": -1}, None, None),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, None, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, None, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, None, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, None, 16384),
        ({"max_position_embeddings": 8192, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}}, None, 65536),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None, 4096),
    ],
)  # fmt: skip
def test_the_limit_is_what_configuration_and_tokenizer_say(told: Any, tokenizer: Any, limit: int | None) -> None:
    assert context_limit(config(**told), SimpleNamespace(model_max_length=tokenizer)).tokens == limit


def test_a_limit_says_how_many_tokens_and_how_many_fit() -> None:
    limit = Limit(100).less(30, "the answer")
    limit.check(70)
    with pytest.raises(Unfit, match=r"71 tokens; 70 fit .*context of 100, less 30 for the answer") as error:
        limit.check(71)
    assert error.value.reason == "too long"
    assert Limit(100).at_most(512, "max_length").tokens == 100
    assert Limit(None).at_most(512, "max_length") == Limit(512, "max_length")
    Limit(None).less(3, "x").check(10**9)


def test_a_prompt_and_its_answer_fit_or_the_prompt_is_not_sampled(engine: LocalEngine) -> None:
    texts = {"short": "tea", "long": BEYOND}
    made = {c.id: c for c in engine.generate([GenerationRequest(k, (user(t),)) for k, t in texts.items()], Sampling(4))}
    assert made["short"].error is None and made["long"].text == ""
    assert "tokens" in str(made["long"].error) and "2048" in str(made["long"].error)
    room = 2048 - len(engine.ids((user("tea"),)))
    [fits] = engine.generate([GenerationRequest("a", (user("tea"),))], Sampling(room, 0))
    [over] = engine.generate([GenerationRequest("a", (user("tea"),))], Sampling(room + 1, 0))
    assert fits.error is None and over.error


def test_a_score_of_a_text_beyond_the_context_is_an_error(engine: LocalEngine) -> None:
    found = {s.id: s for s in engine.score([ScoreRequest(k, (user(t),), ("A", "B"), "(") for k, t in (("a", "tea"), ("b", BEYOND))])}  # fmt: skip
    assert found["a"].error is None and None not in found["a"].logprobs
    assert found["b"].logprobs == (None, None) and "2048" in str(found["b"].error)


def test_a_megabyte_takes_neither_minutes_nor_gigabytes(engine: LocalEngine) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    for text in ("tea " * 250_000, "a" * 1_000_000, " " * 1_000_000 + "x", "🙂" * 250_000, "<|im_end|>" * 100_000):
        [made] = engine.generate([GenerationRequest("a", (user(text),))], Sampling(4))
        [found] = engine.score([ScoreRequest("a", (user(text),), ("A", "B"), "(")])
        assert made.error and found.error
    assert time.monotonic() - start < 20  # seconds; on two busy cores it takes about one
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB


def test_long_rows_are_sampled_few_at_a_time(engine: LocalEngine) -> None:
    rows = [
        (GenerationRequest(str(n), ()), [0] * length) for n, length in enumerate([10] * 262 + [CACHED_TOKENS // 2] * 3)
    ]
    batches = list(engine._batches(rows, max_tokens=8))
    assert [len(b) for b in batches] == [256, 6, 1, 1, 1]
    assert [r.id for b in batches for r, _ in b] == [r.id for r, _ in rows]


def test_fine_tuning_leaves_out_what_would_be_cut(tiny: str, tmp_path: Path) -> None:
    from solon.supervised.sft import sft

    rows = [
        SFTExample(messages=(user("hi"), assistant("tea")), id="a"),
        SFTExample(messages=(user("hi"), assistant(LONG)), id="b"),
        SFTExample(messages=(user(BEYOND * 20), assistant("tea")), id="c"),
        SFTExample(messages=(user("hi"), assistant("<think>tea or coffee")), id="d"),
        SFTExample(messages=(user("hi"), assistant("tea"), user(LONG)), id="e"),  # the learned answer fits
    ]
    settings = TrainSettings(epochs=1, batch_size=2)
    learned: list[SFTExample] = []
    told = sft(
        rows, tiny, tmp_path / "out", settings=settings, adapter=ADAPTER, system=None, dtype="float32",
        learned=learned.extend,
    )  # fmt: skip
    assert [e.id for e in learned] == ["a", "e"]
    assert told["examples"] == 2 and told["left_out"] == {"too long": 2, "no answer to learn": 1}
    with pytest.raises(
        InputError, match=r"no example is left to learn from: 1 too long; the first: .*512 fit \(max_length\)"
    ):
        sft(rows[1:2], tiny, tmp_path / "no", settings=settings, adapter=ADAPTER, system=None, dtype="float32")
    assert not (tmp_path / "no").exists()
    wide = TrainSettings(epochs=1, batch_size=2, max_length=10**6)  # the model's own limit stays
    with pytest.raises(InputError, match="model's context"):
        sft(rows[2:3], tiny, tmp_path / "no", settings=wide, adapter=ADAPTER, system=None, dtype="float32")


def comparison(n: str, prompt: str, chosen: str) -> Comparison:
    return Comparison(id=n, prompt=(user(prompt),), chosen=(assistant(chosen),), rejected=(assistant("no"),), label=0.9)


def test_a_reward_model_and_a_feedback_model_leave_out_what_is_too_long(tiny: str, tmp_path: Path) -> None:
    from solon.constitution import load_constitution
    from solon.feedback.feedback_model import train_feedback_model
    from solon.feedback.questions import HHH
    from solon.feedback.settings import FeedbackTrainSettings
    from solon.reinforcement.reward_model import RewardModel
    from solon.reinforcement.reward_training import train_reward_model
    from solon.reinforcement.settings import RewardSettings

    rows = [comparison("a", "hi", "yes"), comparison("b", "hi", LONG), comparison("c", BEYOND, "yes")]
    common: dict[str, Any] = {"adapter": ADAPTER, "system": "be kind", "dtype": "float32"}
    reference = [(user("hi"), assistant("yes")), (user(BEYOND), assistant("yes"))]
    told = train_reward_model(rows, tiny, tmp_path / "rm", settings=RewardSettings(), reference=reference, **common)
    assert told["comparisons"] == 1 and told["left_out"] == {"too long": 2}
    with pytest.raises(InputError, match="no comparison is left to learn from: 2 too long"):
        train_reward_model(rows[1:], tiny, tmp_path / "x", settings=RewardSettings(), reference=[], **common)
    rewards = RewardModel.load(str(tmp_path / "rm"), "float32")
    assert (
        "2048" in str(rewards.unfit((user(BEYOND), assistant("yes"))))
        and rewards.unfit((user("a"), assistant(LONG))) is None
    )
    with pytest.raises(Unfit):
        rewards.score([(user(BEYOND), assistant("yes"))])
    settings, rules = FeedbackTrainSettings(epochs=1, max_length=1024), load_constitution("solon")
    judged = train_feedback_model(rows, rules, tiny, tmp_path / "fm", question=HHH, settings=settings, **common)
    assert judged["comparisons"] == 1 and judged["left_out"] == {"too long": 2}


def test_ppo_leaves_out_prompts_that_leave_no_room_for_a_response(tiny: str, tmp_path: Path) -> None:
    from solon.reinforcement.settings import PPOSettings
    from solon.reinforcement.trainer import ppo

    prompts = [Prompt(prompt=(user(text),)) for text in ("hi", BEYOND, "tea")]
    settings = PPOSettings(updates=1, rollouts=4, minibatch=4, epochs=1, max_tokens=4)

    def reward(chats: Any) -> list[float]:
        assert all(len(c[0].content) < 10 for c in chats)
        return [float(len(c[-1].content)) for c in chats]

    common: dict[str, Any] = {"settings": settings, "adapter": ADAPTER, "system": None, "dtype": "float32"}
    [made] = ppo(prompts, tiny, reward, tmp_path / "out", **common)
    assert made.meta["left_out"] == {"too long": 1}
    with pytest.raises(InputError, match="no prompt is left"):
        list(ppo(prompts[1:2], tiny, reward, tmp_path / "x", **common))


def test_scores_of_a_file_tell_what_was_too_long(tiny: str, tmp_path: Path) -> None:
    from solon.reinforcement.reward_training import train_reward_model
    from solon.reinforcement.settings import RewardSettings
    from solon.stages.score import Score
    from tests.asking import Called

    train_reward_model([comparison("a", "hi", "yes")], tiny, tmp_path / "rm", settings=RewardSettings(), adapter=ADAPTER,
                       system=None, reference=[], dtype="float32")  # fmt: skip
    rows = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}]} for t in ("hi", BEYOND)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = {"reward_model": str(tmp_path / "rm"), "input_": str(tmp_path / "in.jsonl"), "out": tmp_path / "out.jsonl"}
    call = Called(Score, **given, dtype="float32")
    Score().run(call)
    outcome: Any = call.outcome
    assert outcome.records == 1 and outcome.failed == 1 and "2048" in next(iter(outcome.reasons))
