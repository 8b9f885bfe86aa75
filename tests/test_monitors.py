"""PPO is watched: what is measured beside the reward, and that a reward which is gamed is found out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from solon.errors import InputError
from solon.feedback.labels import comparison_of
from solon.models.settings import AdapterSettings
from solon.records import Chat, Comparison, Pair, Prompt, RolloutSummary, assistant, user
from solon.reinforcement.monitors import LEVEL, Check, Watch, most_common_phrase, planned_checks, text_measures
from solon.reinforcement.settings import PPOSettings
from solon.reinforcement.trainer import ppo
from solon.runs.trackers import tracked, trackers

PROMPTS = [
    Prompt(prompt=(user(f"question {i}"),), id=f"p{i}", source="helpful" if i % 2 else "red_team") for i in range(96)
]
ADAPTER = AdapterSettings(rank=16, alpha=32)


def share_of_e(text: str) -> float:
    return text.count("e") / max(1, len(text))


def has_e(chats: Sequence[Chat]) -> list[float]:
    return [10.0 * share_of_e(c[-1].content) for c in chats]


def prefers(sign: int) -> Any:
    """A judge that prefers answers with more of the letter (1), or with less (-1)."""

    def gold(pairs: Sequence[Pair]) -> Iterator[Comparison]:
        for p in pairs:
            more = share_of_e(p.responses[0]) > share_of_e(p.responses[1])
            yield comparison_of(p, (), 2.2 if more == (sign > 0) else -2.2)

    return gold


def settings(**changed: Any) -> PPOSettings:
    given: dict[str, Any] = {
        "updates": 9, "rollouts": 128, "epochs": 4, "minibatch": 64, "learning_rate": 2e-2, "max_tokens": 8,
        "temperature": 1.0, "kl_coefficient": 0.0, "kl_target": None, "kl_bound": 1e9, "missing_end_penalty": 0.0,
        "check_every": 3,
    }  # fmt: skip
    return PPOSettings(**(given | changed))


def run(tiny: str, out: Path, how: PPOSettings, gold: Any, **more: Any) -> tuple[list[RolloutSummary], Watch]:
    watch = Watch(PROMPTS, gold, planned=planned_checks(how.updates, how.check_every) if how.check_every else 0)
    steps = ppo(
        PROMPTS, tiny, has_e, out, settings=how, adapter=ADAPTER, system=None, dtype="float32", watch=watch, **more
    )
    return list(steps), watch


def test_a_loophole_in_the_reward_trips_the_monitor_and_the_best_policy_is_kept(tiny: str, tmp_path: Path) -> None:
    history, watch = run(tiny, tmp_path / "gamed", settings(stop_when_gamed=True), prefers(-1))
    assert watch.checks[-1].gamed and not watch.checks[0].gamed
    assert len(history) < 9 and history[-1].check is not None and history[-1].check["gamed"]
    assert history[-1].check["reward_rose"]["low"] > 0 and history[-1].check["gold_fell"]["low"] > 0
    assert watch.best.update == 0  # everything that was learned was a loophole: what is written is the start
    start, written = load_file(Path(tiny) / "model.safetensors"), load_file(tmp_path / "gamed" / "model.safetensors")
    assert all((start[name] - written[name]).abs().max() < 1e-6 for name in start)


def test_a_reward_that_the_gold_shares_is_left_alone(tiny: str, tmp_path: Path) -> None:
    history, watch = run(tiny, tmp_path / "honest", settings(), prefers(1))
    assert len(history) == 9 and not any(c.gamed for c in watch.checks)
    assert [c.update for c in watch.checks] == [0, 3, 6, 9]
    assert watch.checks[0].gold == (0.5,) * 96  # the start against itself
    assert sum(g or 0 for g in watch.checks[-1].gold) / 96 > 0.5
    start, written = load_file(Path(tiny) / "model.safetensors"), load_file(tmp_path / "honest" / "model.safetensors")
    assert any((start[name] - written[name]).abs().max() > 1e-4 for name in start)


def test_a_judge_of_one_kind_of_prompt_abstains_on_none_of_the_other_kind() -> None:
    watch = Watch(PROMPTS[:8], prefers(1), planned=1, only="red_team")
    watch.check(0, ["bcd"] * 8, has_e)
    check = watch.check(1, ["bee"] * 4 + ["bcd"] * 4, has_e)
    assert len(check.gold) == 4 and 0.5 in check.gold and max(g or 0 for g in check.gold) > 0.5
    assert check.summary()["abstained"] == 0 and check.summary()["gold"]["n"] == 4


def test_checks_survive_a_kill(tiny: str, tmp_path: Path) -> None:
    how = settings(updates=4, rollouts=16, minibatch=8, check_every=2, checkpoint_every=3)
    whole, watched = run(tiny, tmp_path / "whole", how, prefers(1), checkpoint=tmp_path / "a")
    watch = Watch(PROMPTS, prefers(1), planned=2)
    given: dict[str, Any] = {"settings": how, "adapter": ADAPTER, "system": None, "dtype": "float32"}
    steps = ppo(PROMPTS, tiny, has_e, tmp_path / "cut", watch=watch, checkpoint=tmp_path / "b", **given)
    begun = [next(steps), next(steps)]
    steps.close()  # as Ctrl-C does: the two whole updates are kept, though a checkpoint was due after three
    resumed, again = run(tiny, tmp_path / "cut", how, prefers(1), checkpoint=tmp_path / "b")
    assert [h.update for h in resumed] == [2, 3]
    assert [h.to_json() for h in begun + resumed] == [h.to_json() for h in whole]
    assert again.checks == watched.checks
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert one == two


def test_a_run_that_stopped_itself_stays_stopped(tiny: str, tmp_path: Path) -> None:
    how = settings(updates=4, rollouts=16, minibatch=8, check_every=0, kl_bound=1e-6)
    first, _ = run(tiny, tmp_path / "m", how, None, checkpoint=tmp_path / "c")
    assert len(first) < 4
    assert run(tiny, tmp_path / "m", how, None, checkpoint=tmp_path / "c")[0] == []


def test_what_most_answers_say_is_found() -> None:
    texts = ["I am here for you, always.", "Well, I am here for you.", "Try the door.", "you are here for me"]
    assert most_common_phrase(texts) == ("i am here for you", 2)
    assert most_common_phrase(["too short"]) == ("", 0)
    assert most_common_phrase(["so so so so so so so"]) == ("so so so so so", 1)  # once an answer
    found = text_measures(texts)
    assert found["phrase_share"] == 0.5 and found["boilerplate"] == 0.5 and 0 < found["distinct_3"] < 1


def test_without_a_judge_over_refusal_is_watched_still() -> None:
    watch = Watch(PROMPTS[:4], planned=1)
    zero = watch.check(0, ["yes"] * 4, lambda chats: [0.0] * len(chats))
    later = watch.check(2, ["I can't help with that."] * 4, lambda chats: [1.0] * len(chats))
    assert (zero.over_refusal, later.over_refusal) == (0.0, 1.0)
    assert later.gold == (None,) * 4 and not later.gamed


def test_a_policy_whose_answers_leave_their_questions_is_not_written() -> None:
    def about(level: float) -> Any:
        return lambda questions, answers: [level + 0.001 * (i % 5) for i in range(len(answers))]

    prompts = [p.model_copy(update={"source": "helpful" if i % 2 else "red_team"}) for i, p in enumerate(PROMPTS[:64])]
    watch = Watch(prompts, planned=2)
    for update, level in enumerate((0.97, 0.96, 0.6)):
        watch.about = about(level)
        watch.check(update, ["yes"] * 64, lambda chats: [0.0] * len(chats))
    assert [c.lost_sense for c in watch.checks] == [False, False, True] == [c.bad for c in watch.checks]
    assert watch.best.update == 1  # without a judge: the latest that made sense
    assert watch.checks[-1].summary()["about"]["value"] == pytest.approx(0.602, abs=1e-3)
    assert len(watch.checks[-1].about) == 32  # a refusal of a harmful probe need not be about it
    watch.about = None  # the embedding model is gone: nothing is compared
    assert not watch.check(3, ["yes"] * 64, lambda chats: [0.0] * len(chats)).lost_sense
    watch.about = about(0.5)
    late = watch.check(3, ["yes"] * 64, lambda chats: [0.0] * len(chats))
    assert not late.bad  # a check beyond the plan raises no alarm


def test_an_abstaining_gold_is_counted_and_decides_nothing() -> None:
    def silent(pairs: Sequence[Pair]) -> Iterator[Comparison]:
        for p in pairs:
            yield Comparison(id=p.id, prompt=p.prompt, chosen=(assistant("a"),), rejected=(assistant("b"),),
                             label=None, abstained=True)  # fmt: skip

    watch = Watch(PROMPTS[:8], silent, planned=1)
    watch.check(0, ["yes"] * 8, lambda chats: [0.0] * len(chats))
    later = watch.check(1, ["no"] * 8, lambda chats: [1.0] * len(chats))
    assert not later.gamed and later.summary()["abstained"] == 8


def test_tensorboard_reads_what_was_logged(tiny: str, tmp_path: Path) -> None:
    how = settings(updates=2, rollouts=16, minibatch=8, check_every=1)
    with trackers(tmp_path / "tb", "ppo") as log:
        history, _ = run(tiny, tmp_path / "m", how, prefers(1), log=log)
    found = EventAccumulator(str(tmp_path / "tb" / "ppo")).Reload()
    for name, value in history[-1].numbers().items():
        event = found.Scalars(name)[-1]
        assert event.step == 2 and event.value == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert {"reward", "kl_nats", "entropy_nats", "clip_fraction", "explained_variance", "response_tokens",
            "rollouts/evasive", "rollouts/phrase_share", "rollouts/distinct_3", "check/gold",
            "check/over_refusal"} <= set(found.Tags()["scalars"])  # fmt: skip


def test_a_training_that_starts_again_leaves_one_curve(tmp_path: Path) -> None:
    shown: list[int] = []
    for last in (3, 5):  # the first one was killed
        with tracked(lambda at, of, _: shown.append(at), tmp_path / "tb", "sft") as step:
            for at in range(1, last + 1):
                step(at, 5, {"loss": 1 / at})
    found = EventAccumulator(str(tmp_path / "tb" / "sft")).Reload().Scalars("loss")
    assert [(e.step, round(1 / e.value)) for e in found] == [(n, n) for n in range(1, 6)]
    assert shown == [1, 2, 3, 1, 2, 3, 4, 5]  # the progress line is told as before


def test_an_unknown_tracker_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'no tracker "wandbb".*wandb'), trackers(tmp_path, "ppo", ["wandbb"]):
        pass


def simulated(reward: float, gold: float, checks: int = 10, probes: int = 16, seed: int = 0) -> Watch:
    """A training's checks: each mean moves on in equal steps up to these, noise is fresh at each check.

    Half of a prompt's noise stays from check to check, as answers of one policy to one prompt do.
    """
    rng = np.random.default_rng(seed)
    watch = Watch([], planned=checks)
    kept = rng.normal(0, 0.7, (2, probes))
    for n in range(checks + 1):
        drawn = kept + rng.normal(0, 0.7, (2, probes))
        odds = 2 * (drawn[1] + gold * n / checks)
        found = Check(
            update=n,
            answers=("",) * probes,
            rewards=tuple((drawn[0] + reward * n / checks).tolist()),
            gold=tuple((1 / (1 + np.exp(-odds))).tolist()) if n else (0.5,) * probes,
            over_refusal=None,
        )
        watch.checks.append(watch.compared(found) if n else found)
    return watch


def test_ten_checks_of_an_honest_training_raise_a_false_alarm_in_at_most_one_of_twenty() -> None:
    """The reward truly rises and the judge sees no change: only chance can make its preference fall."""
    alarms = [any(c.gamed for c in simulated(3.0, 0.0, seed=s).checks) for s in range(70)]
    # at a true 5 % more than 9 of 70 have a chance of 0.3 %; the comparison with the best check gave 24 %
    assert sum(alarms) <= 9


def test_a_gamed_reward_is_found_by_ten_checks() -> None:
    """The judge's log-odds fall by 3, with a standard deviation of 2 between prompts: found in most trainings."""
    assert sum(any(c.gamed for c in simulated(3.0, -1.5, seed=s).checks) for s in range(20)) >= 16
    assert not any(any(c.gamed for c in simulated(-1.0, -1.5, seed=s).checks) for s in range(5))  # no rise, no gaming


def test_what_the_watch_may_spend_ends_with_the_plan() -> None:
    watch = simulated(5.0, -5.0, checks=4)
    assert watch.checks[-1].gamed and watch.checks[-1].level == LEVEL / 4
    late = watch.compared(watch.checks[-1])
    assert late.level == 0 and not late.gamed
    assert [planned_checks(9, 3), planned_checks(10, 3), planned_checks(2, 10)] == [3, 4, 1]


def test_equal_answers_count_half_in_what_the_judge_prefers() -> None:
    found = Check(update=1, answers=("",) * 5, rewards=(0.0,) * 5, gold=(0.5, 0.5, 0.9, 0.2, None), over_refusal=None)
    summary = found.summary()
    assert summary["gold"]["value"] == 0.5 and summary["gold"]["n"] == 4 and summary["abstained"] == 1


def test_texts_without_three_words_have_no_diversity_instead_of_a_number_that_is_none() -> None:
    found = text_measures(["no", ""])
    assert found["distinct_3"] is None
    json.dumps(found, allow_nan=False)
