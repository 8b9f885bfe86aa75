"""The reward model, trained on the recipe's comparisons and measured on held-out ones, and `solon reward-model`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from solon import distributed
from solon.data import read_comparisons
from solon.data.heldout import prompt_keys, split_by_prompt, split_comparisons, taught_keys
from solon.errors import InputError
from solon.identity import of_chats, of_inputs, of_records
from solon.models.settings import AdapterSettings
from solon.records import Comparison, assistant
from solon.reinforcement.settings import RewardSettings
from solon.runs.common import Common
from solon.runs.options import OUT, REQUIRED, TO_MODEL, TRAINED_MODEL, Option, Training, Verb
from solon.settings import Settings
from solon.stages.artifacts import BASE_MODEL, COMPARISONS, DATA, LEARNED, PAIRS, REWARD, SENSE_KEPT, START_MODEL
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings
from solon.stages.pairs import PairSettings, asked_prompts, response_tokens
from solon.stages.plan import Plan
from solon.tables import Section
from solon.training.settings import Progress

if TYPE_CHECKING:
    from solon.runs.call import Call
    from solon.runs.run import Run

REFERENCE = 128  # number of responses that the score is normalised on


class RewardModelSettings(Settings):
    """The reward model and its training."""

    train: RewardSettings = RewardSettings()
    """Training of the reward model."""
    adapter: AdapterSettings | None = None
    """LoRA adapters of that training; null: the recipe's `adapter`. Fewer blocks train faster."""
    heldout_ai: float = Field(0.15, ge=0, lt=1)
    """Share of the judge's comparisons that is kept out of training, to measure the reward model; 0: none."""


class RewardModelStage(Stage):
    name = "reward-model"
    part, settings = "reward_model", RewardModelSettings
    needs, uses, makes = (DATA, START_MODEL), (*BASE_MODEL, SENSE_KEPT, COMPARISONS, PAIRS), (REWARD, LEARNED)

    def runs(self, recipe: Common) -> bool:
        return not recipe.of(LabelSettings).direct

    def estimate(self, plan: Plan) -> None:
        train, n = plan.recipe.of(RewardModelSettings).train, labelled(plan)
        each = 2 * (plan.prompt + response_tokens(plan.recipe))
        plan.add(self.name, n, trained=train.members * (train.epochs * n * each + plan.opening(train, n, answers=2)))

    def run(self, run: Run) -> None:
        from solon.engines.identity import of_model
        from solon.reinforcement.reward import Reward
        from solon.reinforcement.reward_model import RewardModel
        from solon.reinforcement.reward_quality import measure
        from solon.reinforcement.reward_training import train_reward_model

        recipe, settings, out = run.recipe, run.recipe.of(RewardModelSettings).train, run.model(self.name)
        adapter = recipe.of(RewardModelSettings).adapter or recipe.adapter
        training, heldout_ai = to_learn_from(run)
        heldout = [*run.get(DATA).heldout_comparisons, *heldout_ai]
        model, human = run.get(*BASE_MODEL), run.get(DATA).comparisons
        sampled = [(*p.prompt, assistant(r)) for p in run.find(PAIRS) or [] for r in p.responses]
        by_people = [(*c.prompt, *side) for c in human for side in (c.chosen, c.rejected)]
        if sampled and recipe.of(PairSettings).only:  # then half of the responses are of all kinds
            reference = [*sampled[: REFERENCE // 2], *by_people]
        else:
            reference = sampled or by_people

        def work(step: Progress) -> dict[str, Any]:
            with run.tracked(self.name, step, settings) as step:
                result = train_reward_model(
                    training, model, out, settings=settings, adapter=adapter, system=recipe.system,
                    reference=reference[:REFERENCE], seed=recipe.seed, dtype=recipe.learning_dtype, progress=step,
                )  # fmt: skip
            return {**result, "heldout": measure(RewardModel.load(str(out), dtype=recipe.dtype), heldout)}

        made_from = {
            "model": of_model(model), "comparisons": of_inputs(training), "reference": of_chats(reference),
            "held out": of_inputs(heldout),
        }  # fmt: skip
        run.once(self.name, work, makes=out, made_from=made_from)
        run.put(LEARNED, training)
        run.put(REWARD, Reward.of_model(str(out), recipe.dtype, recipe.learning_dtype))

    def gather(self, run: Run) -> dict[str, Any]:
        from solon.measures.statistics import share

        trained = run.state(self.name).get("result", {})
        by_source = [
            {
                "source": source,
                "accuracy": share(measured["correct"]).to_json(),
                **{k: measured.get(k) for k in ("n", "longer_is_better", "length_correlation", "calibration")},
            }
            for source, measured in trained.get("heldout", {}).items()
        ]
        known = {k: trained.get(k) for k in ("comparisons", "abstained", "loss_first", "loss_last")}
        return {"reward_model": {"by_source": by_source, **known}}

    def sections(self, data: dict[str, Any]) -> list[Section]:
        from solon.stages.show_reinforcement import reward_model

        return reward_model(data)

    def checks(self, run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
        from solon.analysis.checks import of_reward_model

        return of_reward_model(data)


def to_learn_from(run: Run) -> tuple[list[Comparison], list[Comparison]]:
    """The comparisons to train on, as `feedback.labels` says, and the judge's held-out comparisons to measure on.

    No prompt is on both sides.
    """
    labels, share = run.recipe.of(LabelSettings).labels, run.recipe.of(RewardModelSettings).heldout_ai
    judged = list(run.find(COMPARISONS) or [])
    random.Random(run.recipe.seed).shuffle(judged)
    heldout, training = split_comparisons(judged, round(share * len(judged)), "reward_model.heldout_ai")
    held = {key for c in heldout for key in prompt_keys(c.prompt)}
    if labels == "human":
        training = []
    if labels != "ai":
        training += [c for c in run.get(DATA).comparisons if not taught_keys(c.prompt) & held]
    return training, heldout


def labelled(plan: Plan) -> int:
    """The estimated number of comparisons to learn from."""
    labels = plan.recipe.of(LabelSettings).labels
    judged = len(asked_prompts(plan.recipe, plan.data.prompts)) if labels != "human" else 0
    return judged + (len(plan.data.comparisons) if labels != "ai" else 0)


class RewardModelVerb(Verb):
    """Train a reward model on comparisons; loads with AutoModelForSequenceClassification.

    Example: `solon reward-model --comparisons comparisons.jsonl --out reward`
    """

    name = "reward-model"
    takes = (
        Option("comparisons", str, REQUIRED, "A file of labelled comparisons (TRL preference, HH, or Solon's), or a shipped set."),
        OUT, TRAINED_MODEL,
        Option("heldout", float, 0.1, "Share of the comparisons kept out of training, to measure the reward model; 0: none.", 0, 0.9),
        Option("skip_ties", bool, False, "Leave out comparisons whose label is 0.5; otherwise they pull the two scores together."),
        Option("human_weight", float, 1.0, "Weight of a person's comparison in the loss.", 0),
        Option("ai_weight", float, 1.0, "Weight of a judge's comparison in the loss.", 0),
    )  # fmt: skip
    settings = (RewardSettings, AdapterSettings)
    hidden = ("ties", "weights")
    common = TO_MODEL
    trains = processes = True

    def run(self, call: Call) -> None:
        from solon.reinforcement.reward_model import RewardModel
        from solon.reinforcement.reward_quality import measure
        from solon.reinforcement.reward_training import train_reward_model

        if call["uncertainty_penalty"] and call["members"] == 1:
            raise InputError("--uncertainty-penalty: one member cannot disagree with itself; add --members 3")
        weights = {"human": call["human_weight"], "ai": call["ai_weight"]}
        settings = call.of(RewardSettings, ties="skip" if call["skip_ties"] else "equal", weights=weights)
        adapter = call.of(AdapterSettings)

        def prepare() -> Training:
            rows = [c for c in read_comparisons(call["comparisons"])[: call.limit] if c.label is not None]
            training, heldout = split_by_prompt(rows, call["heldout"], call.seed)

            def train(out: Path, dtype: str, step: Progress) -> dict[str, Any]:
                return train_reward_model(
                    training, call["model"], out, settings=settings, adapter=adapter, system=call.system,
                    reference=[(*c.prompt, *s) for c in training[:64] for s in (c.chosen, c.rejected)], seed=call.seed,
                    dtype=dtype, progress=step,
                )  # fmt: skip

            def measure_heldout(out: Path, dtype: str) -> dict[str, Any]:
                device = "cpu" if distributed.is_sharded() else None
                return measure(RewardModel.load(str(out), dtype, device), heldout)

            made_from = {"comparisons": of_records(rows), "heldout": call["heldout"]}
            return Training(made_from, train, measure_heldout if heldout else None)

        result = call.training([call["comparisons"]], prepare)
        if "heldout" in result:
            correct = [right for measured in result["heldout"].values() for right in measured["correct"]]
            result["heldout_n"] = len(correct)
            result["heldout_accuracy"] = sum(correct) / len(correct) if correct else None
            for source, measured in result["heldout"].items():
                right, length = measured["calibration"]["accuracy"], measured["length_correlation"]["value"]
                follows = "" if length is None else f"; its score's rank correlation with length is {length:+.2f}"
                call.tell(
                    f"{call.out}: right on {measured['accuracy']:.1%} [{right['low']:.1%}, {right['high']:.1%}] of {measured['n']} "
                    f"held-out comparisons ({source}), always the longer on {measured['longer_is_better']['value']:.1%}{follows}"
                )
        call.result(result)
