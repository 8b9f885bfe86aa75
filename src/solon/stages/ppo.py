"""PPO against the reward, with a KL penalty towards the model it starts from; a judge checks the policy meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from solon.engines import Engine
from solon.models.settings import AdapterSettings
from solon.publishing import Identity
from solon.records import Comparison, Pair, Prompt, RolloutSummary
from solon.reinforcement.settings import PPOSettings
from solon.runs.common import Common
from solon.runs.options import CONSTITUTION, OUT, REQUIRED, SET, TO_MODEL, TRAINED_MODEL, Option, Verb
from solon.settings import Settings
from solon.stages.artifacts import BASE_MODEL, DATA, JUDGE, REWARD
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings, asks_judge, judge_spec
from solon.stages.judging import judge_of
from solon.stages.reinforcement import Reinforcement
from solon.training.settings import Log, Progress

if TYPE_CHECKING:
    from solon.reinforcement.monitors import Watch
    from solon.runs.call import Call
    from solon.runs.run import Run
    from solon.stages.plan import Plan


class GoldSettings(Settings):
    """Who checks the policy while it trains, every ppo.check_every updates: see reinforcement/monitors.py."""

    judge: str | None = None
    """The judge of the checks: anything that --model takes; null: the judge of the feedback."""
    probes: int = Field(32, ge=2)
    """Training prompts that the policy answers at every check, half of them red-team."""


class Gold(Stage):
    """The part `gold` of a recipe. It has no work of its own: PPO asks it."""

    name = "gold"
    part, settings = "gold", GoldSettings

    def models(self, recipe: Common) -> dict[str, str]:
        judge = recipe.of(GoldSettings).judge
        return {} if judge is None else {"gold.judge": judge}

    def run(self, run: Run) -> None:
        pass


class PPO(Reinforcement):
    name = "ppo"
    part, settings = "ppo", PPOSettings
    uses = (*Reinforcement.uses, JUDGE)

    def __init__(self) -> None:
        self._watch: Watch | None = None

    def check(self, recipe: Common) -> None:
        super().check(recipe)
        if (
            recipe.algorithm == self.name
            and recipe.of(LabelSettings).direct
            and recipe.of(PPOSettings).value_start == "reward-model"
        ):
            raise ValueError("ppo.value_start: reward-model, and feedback.direct trains none; set it to zero")

    def warnings(self, run: Run) -> list[str]:
        found = run.state(self.name).get("result", {})
        if not found.get("gamed"):
            return []
        return [
            "The reward was being gamed: it rose while the judge's preference fell. What was written is the policy after "
            f"{found['written_after']} updates."
        ]

    def estimate(self, plan: Plan) -> None:
        from solon.stages.plan import FILLED

        recipe, ppo, gold = plan.recipe, plan.recipe.of(PPOSettings), plan.recipe.of(GoldSettings)
        response, rollouts = ppo.max_tokens * FILLED, ppo.updates * ppo.rollouts
        checks = math.ceil(ppo.updates / ppo.check_every) if ppo.check_every else 0
        probes = (checks + bool(checks)) * gold.probes  # update 0 answers too, and is compared with nothing
        judge = gold.judge or (judge_spec(recipe) if asks_judge(recipe) else None)
        questions = [plan.comparing(judge, checks * gold.probes, response)] if judge else []
        if recipe.of(LabelSettings).direct:
            questions.append(plan.rating(judge_spec(recipe), rollouts + probes, response))
        sampled = rollouts + probes
        plan.add(
            self.name, ppo.updates, read=sampled * plan.prompt, written=sampled * response,
            trained=ppo.epochs * rollouts * (plan.prompt + response), questions=questions,
        )  # fmt: skip

    def sampling(self, recipe: Common) -> tuple[float, int]:
        return recipe.of(PPOSettings).temperature, recipe.of(PPOSettings).max_tokens

    def updates(self, recipe: Common) -> int:
        return recipe.of(PPOSettings).updates

    def gold_judge(self, run: Run) -> str | None:
        """The model that checks the policy; None where nothing is checked or nobody judges."""
        judge = run.recipe.of(GoldSettings).judge or run.find(JUDGE)
        return judge if run.recipe.of(PPOSettings).check_every else None

    def made_from(self, run: Run) -> Identity:
        from solon.engines.identity import of_model

        gold = self.gold_judge(run)
        return {**super().made_from(run), **({"gold": of_model(gold)} if gold else {})}

    def begin(self, run: Run) -> None:
        """Where summaries of updates are gone from the journal, begin anew: an update is not made by itself."""
        from solon.reinforcement.checkpoint import CHECKPOINT, updates_in

        self._watch = self.watch(run)
        state, checkpoint = run.state(self.name), run.path(self.name, "checkpoint")
        done = state["records"] if state.get("done") else updates_in(checkpoint)
        there = {row["id"] for row in run.journalled(self.name)}
        if gone := {f"update-{n}" for n in range(done)} - there:
            (checkpoint / CHECKPOINT).unlink(missing_ok=True)
            run.reopen(self.name, f"{len(gone)} of {done} updates are gone from {run.path(self.name)}")

    def watch(self, run: Run) -> Watch | None:
        """The probe prompts, half of them red-team, and the judge of the answers to them."""
        from solon.reinforcement.monitors import Watch, planned_checks

        ppo, half = run.recipe.of(PPOSettings), run.recipe.of(GoldSettings).probes // 2
        if not ppo.check_every:
            return None
        prompts = run.get(DATA).prompts
        probes = [p for source in ("red_team", "helpful") for p in [p for p in prompts if p.source == source][:half]]
        self._gold = None
        if (spec := self.gold_judge(run)) is not None:
            self._gold = run.engine(spec)
        engine = self._gold

        def gold(pairs: Sequence[Pair]) -> list[Comparison]:
            assert engine is not None
            with engine:  # the judge is in memory only while it is asked
                return list(judge_of(run, engine).compare(pairs))

        return Watch(probes, gold if engine else None, planned=planned_checks(ppo.updates, ppo.check_every))

    def engines(self, run: Run) -> list[Engine]:
        gold = getattr(self, "_gold", None)
        return [*super().engines(run), *([gold] if gold else [])]

    def train(self, run: Run, log: Log, step: Progress) -> Iterator[RolloutSummary]:
        from solon.constitution import of_constitution
        from solon.engines.identity import of_model
        from solon.feedback.judge import asked_constitution
        from solon.feedback.settings import JudgeSettings
        from solon.reinforcement.trainer import ppo

        recipe, reward, gold = run.recipe, run.get(REWARD), self.gold_judge(run)
        assert recipe.adapter is not None
        more = {
            "judge": None if reward.directory else reward.identity,
            "gold": of_model(gold) if gold else None,
            **of_constitution(asked_constitution(run.constitution, recipe.of(JudgeSettings))),
        }
        return ppo(
            run.get(DATA).prompts, run.get(*BASE_MODEL), reward.directory or reward.score, run.model("rl-cai"),
            settings=recipe.of(PPOSettings), adapter=recipe.adapter, system=recipe.system, seed=recipe.seed,
            dtype=recipe.learning_dtype, checkpoint=run.path(self.name, "checkpoint"), watch=self._watch, log=log,
            progress=step, more=more,
        )  # fmt: skip

    def summary(self, run: Run, history: Sequence[RolloutSummary]) -> dict[str, Any]:
        watch = self._watch
        gamed = bool(watch and watch.checks[-1].gamed)
        found = super().summary(run, history)
        return {
            **found,
            "tokens": found["tokens"] * run.recipe.of(PPOSettings).epochs,
            # Where the last check found the reward gamed, the policy of the best check is written.
            "written_after": watch.best.update if watch and gamed else len(history),
            "gamed": gamed,
        }


class PPOVerb(Verb):
    """PPO against a reward model; writes a complete model.

    Example: `solon ppo --prompts solon:helpful --reward-model reward --out rl`
    """

    name = "ppo"
    takes = (
        Option("prompts", str, REQUIRED, "Prompts (.jsonl), or a shipped set."),
        Option("reward_model", str, REQUIRED, "A reward model written by Solon."),
        OUT, TRAINED_MODEL, SET,
        Option("gold", str | None, None, "A judge that checks the policy every --check-every updates."),
        CONSTITUTION,
        Option("probes", int, 32, "Prompts that each check asks.", 2),
    )  # fmt: skip
    settings = (PPOSettings, AdapterSettings)
    common = TO_MODEL
    trains = processes = True

    def run(self, call: Call) -> None:
        from solon import distributed
        from solon.constitution import of_constitution
        from solon.data import read_prompts
        from solon.engines.identity import decided_dtype, of_model
        from solon.errors import InputError
        from solon.identity import of_records
        from solon.reinforcement.checkpoint import CHECKPOINT
        from solon.reinforcement.settings import GROWS
        from solon.reinforcement.trainer import ppo

        settings, adapter, gold = call.of(PPOSettings), call.of(AdapterSettings), call["gold"]
        if gold and not settings.check_every:
            raise InputError("--gold is asked every so many updates; add --set check_every=10")
        model, reward, kept = call["model"], call["reward_model"], call.out.with_name(f"{call.out.name}.checkpoint")
        with call.directory([call["prompts"], reward, model, gold], [kept]) as target:
            prompts = read_prompts(call["prompts"])[: call.limit]
            dtype = decided_dtype(call.dtype, target.identity, model, "training")
            checked = settings.check_every > 0
            checks = {"gold": of_model(gold) if gold else None, **of_constitution(call.constitution)} if checked else {}
            identity = {
                "verb": "ppo", "model": of_model(model), "reward": of_model(reward), "prompts": of_records(prompts),
                "settings": settings.model_dump(exclude=GROWS), "adapter": adapter.model_dump(), "system": call.system,
                "seed": call.seed, "dtype": dtype, "probes": call["probes"] if checked else None, **checks,
            }  # fmt: skip
            result = target.settled(identity, restart=call.restart)
            if call.restart and distributed.is_main():
                (kept / CHECKPOINT).unlink(missing_ok=True)
            distributed.barrier()  # until it is gone for all
            again = result is not None and settings.updates <= result["asked_updates"]
            history: list[RolloutSummary] = []
            if not again:
                watch = verb_watch(call, settings, prompts) if checked else None
                with call.progress() as step, call.log(settings.model_dump(mode="json")) as log:
                    history = list(
                        ppo(
                            prompts, model, reward, target.path, settings=settings, adapter=adapter, system=call.system,
                            seed=call.seed, dtype=dtype, checkpoint=kept, watch=watch, log=log, progress=step, more=checks,
                        )
                    )  # fmt: skip
                result = {
                    "left_out": history[-1].meta.get("left_out", {}) if history else {},
                    "asked_updates": settings.updates,
                    "gamed_after": watch.best.update if watch and watch.checks[-1].gamed else None,
                }
                target.settle(identity, result)
        assert result is not None
        call.tell_again(again)
        if result["gamed_after"] is not None:
            call.tell(
                f"{call.out}: the reward was being gamed; this is the policy after {result['gamed_after']} updates"
            )
        call.tell_left_out(result["left_out"], "the prompts")
        call.result({"left_out": result["left_out"], "updates": [h.to_json() for h in history]})


def verb_watch(call: Call, settings: PPOSettings, prompts: Sequence[Prompt]) -> Watch:
    """The checks of `solon ppo`: the first prompts are the probes, and --gold judges the answers."""
    from solon.engines import LazyEngine
    from solon.feedback.judges import open_judge
    from solon.feedback.settings import JudgeSettings
    from solon.reinforcement.monitors import Watch, planned_checks

    planned, probes = planned_checks(settings.updates, settings.check_every), prompts[: call["probes"]]
    if not call["gold"]:
        return Watch(probes, planned=planned)
    engine = LazyEngine(call["gold"], system=call.system, dtype=call.dtype)
    judge = open_judge(engine, call.constitution, JudgeSettings(), seed=call.seed)

    def gold(pairs: Sequence[Pair]) -> list[Comparison]:
        with engine:  # the judge is in memory only while it is asked
            return list(judge.compare(pairs))

    return Watch(probes, gold, planned=planned)
