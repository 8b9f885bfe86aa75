"""PPO against the reward, with a KL penalty towards the start model and checks by a judge meanwhile, and `solon ppo`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from solon import distributed
from solon.constitution import of_constitution
from solon.data import read_prompts
from solon.engines import Engine, LazyEngine
from solon.errors import InputError
from solon.feedback.settings import JudgeSettings
from solon.identity import of_records
from solon.models.settings import AdapterSettings
from solon.publishing import Identity
from solon.records import Comparison, Pair, Prompt, RolloutSummary, Source
from solon.reinforcement.settings import PPOSettings
from solon.runs.common import Common
from solon.runs.options import CONSTITUTION, OUT, REQUIRED, REWARD_MODEL, SET, TO_MODEL, TRAINED_MODEL, Option, Verb
from solon.settings import Settings
from solon.stages.artifacts import BASE_MODEL, DATA, JUDGE, REWARD
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings, asks_judge, judge_spec
from solon.stages.judging import judge_of
from solon.stages.pairs import PairSettings
from solon.stages.plan import FILLED, Plan
from solon.stages.reinforcement import Reinforcement
from solon.stages.reward_model import RewardModelSettings
from solon.stages.sense import SenseSettings
from solon.terminal import note
from solon.training.settings import Log, Progress

if TYPE_CHECKING:
    from solon.feedback.judge import Judge
    from solon.reinforcement.monitors import Watch
    from solon.runs.call import Call
    from solon.runs.run import Run


class GoldSettings(Settings):
    """The judge that checks the policy during PPO, after every `ppo.check_every` updates, for a reward that is being gamed."""

    judge: str | None = None
    """The judge of these checks, named as for --model; null: the judge of the feedback, and none with human labels only."""
    probes: int = Field(32, ge=2)
    """Number of training prompts that the policy answers at every check, half of them red-team."""


class Gold(Stage):
    """The section `gold` of a recipe. The stage does nothing: PPO asks the judge."""

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
        self._gold: LazyEngine | None = None
        self._watch: Watch | None = None

    def check(self, recipe: Common) -> None:
        super().check(recipe)
        direct, start = recipe.of(LabelSettings).direct, recipe.of(PPOSettings).value_start
        if recipe.algorithm == self.name and direct and start != "zero":
            raise ValueError(
                f"ppo.value_start: {start} needs a reward model, and feedback.direct trains none; set it to zero"
            )
        if (
            recipe.algorithm == self.name
            and start == "beginnings"
            and not recipe.of(RewardModelSettings).train.beginnings
        ):
            raise ValueError(
                "ppo.value_start: beginnings needs a reward model that learns them; set reward_model.train.beginnings"
            )

    def warnings(self, run: Run) -> list[str]:
        result = run.state(self.name).get("result", {})
        why = []
        if result.get("gamed"):
            why.append("The reward was being gamed: it rose while the judge's preference fell.")
        if result.get("lost_sense"):
            why.append("The policy was losing its sense: its answers became less about their questions.")
        return (
            [f"{' '.join(why)} What was written is the policy after {result['written_after']} updates."] if why else []
        )

    def estimate(self, plan: Plan) -> None:
        recipe, ppo, gold = plan.recipe, plan.recipe.of(PPOSettings), plan.recipe.of(GoldSettings)
        response, rollouts = ppo.max_tokens * FILLED, ppo.updates * ppo.rollouts
        checks = math.ceil(ppo.updates / ppo.check_every) if ppo.check_every else 0
        probes = (checks + bool(checks)) * gold.probes  # the first check, before any update, only answers
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
        """The judge that checks the policy; None where there are no checks or no judge."""
        judge = run.recipe.of(GoldSettings).judge or run.find(JUDGE)
        return judge if run.recipe.of(PPOSettings).check_every else None

    def made_from(self, run: Run) -> Identity:
        from solon.engines.identity import of_model

        gold = self.gold_judge(run)
        return {**super().made_from(run), **({"gold": of_model(gold)} if gold else {})}

    def begin(self, run: Run) -> None:
        """Make the checks. Where summaries of updates are gone from the journal, begin again: one update cannot be made alone."""
        from solon.reinforcement.checkpoint import CHECKPOINT, updates_in

        self._gold, self._watch = self._plan_checks(run)
        state, checkpoint = run.state(self.name), run.path(self.name, "checkpoint")
        done = state["records"] if state.get("done") else updates_in(checkpoint)
        there = {row["id"] for row in run.journalled(self.name)}
        if gone := {f"update-{n}" for n in range(done)} - there:
            (checkpoint / CHECKPOINT).unlink(missing_ok=True)
            run.folder(self.name).reopen(f"{len(gone)} of {done} updates are gone from {run.path(self.name)}")

    def _plan_checks(self, run: Run) -> tuple[LazyEngine | None, Watch | None]:
        """The engine of the gold judge, and the checks: the probe prompts, half of them red-team, and the judge."""
        settings, half = run.recipe.of(PPOSettings), run.recipe.of(GoldSettings).probes // 2
        if not settings.check_every:
            return None, None
        prompts = run.get(DATA).prompts
        probes = [p for source in ("red_team", "helpful") for p in [p for p in prompts if p.source == source][:half]]
        spec = self.gold_judge(run)
        engine = None if spec is None else run.engine(spec)
        sense, judge = run.recipe.of(SenseSettings), None if engine is None else judge_of(run, engine)
        only = run.recipe.of(PairSettings).only if run.recipe.of(GoldSettings).judge is None else None
        return engine, make_watch(settings, probes, engine, judge, sense, only)

    def engines(self, run: Run) -> list[Engine]:
        return [*super().engines(run), *([self._gold] if self._gold else [])]

    def train(self, run: Run, log: Log, step: Progress) -> Iterator[RolloutSummary]:
        from solon.engines.identity import of_model
        from solon.feedback.judge import asked_constitution
        from solon.reinforcement.trainer import ppo

        recipe, reward, gold = run.recipe, run.get(REWARD), self.gold_judge(run)
        assert recipe.adapter is not None
        more = {
            "judge": None if reward.directory else reward.identity,
            "gold": of_model(gold) if gold else None,
            **of_constitution(asked_constitution(run.constitution, recipe.of(JudgeSettings))),
        }
        return ppo(
            run.get(DATA).rl_prompts, run.get(*BASE_MODEL), reward.directory or reward.score, run.model("rl-cai"),
            settings=recipe.of(PPOSettings), adapter=recipe.adapter, system=recipe.system, seed=recipe.seed,
            dtype=recipe.learning_dtype, checkpoint=run.path(self.name, "checkpoint"), watch=self._watch, log=log,
            progress=step, more=more,
        )  # fmt: skip

    def summary(self, run: Run, history: Sequence[RolloutSummary]) -> dict[str, Any]:
        checks = self._watch
        last = checks.checks[-1] if checks else None
        summary = super().summary(run, history)
        return {
            **summary,
            "tokens": summary["tokens"] * run.recipe.of(PPOSettings).epochs,
            # Where the last check is bad, the policy of the best check is written.
            "written_after": checks.best.update if checks and last and last.bad else len(history),
            "gamed": bool(last and last.gamed),
            "lost_sense": bool(last and last.lost_sense),
        }


class PPOVerb(Verb):
    """PPO against a reward model; writes a complete model.

    Example: `solon ppo --prompts solon:helpful --reward-model reward --out rl`
    """

    name = "ppo"
    takes = (
        Option("prompts", str, REQUIRED, "A file of prompts (.jsonl), or a shipped set."),
        REWARD_MODEL, OUT, TRAINED_MODEL, SET,
        Option("gold", str | None, None, "A judge that checks the policy after every --check-every updates."),
        CONSTITUTION,
        Option("probes", int, 32, "Number of prompts that the policy answers at each check, from the first one.", 2),
    )  # fmt: skip
    settings = (PPOSettings, AdapterSettings)
    common = TO_MODEL
    trains = processes = True

    def run(self, call: Call) -> None:
        from solon.engines.identity import decided_dtype, of_model
        from solon.feedback.checks import require_runnable
        from solon.reinforcement.checkpoint import CHECKPOINT
        from solon.reinforcement.trainer import ppo

        settings, adapter, gold = call.of(PPOSettings), call.of(AdapterSettings), call["gold"]
        if gold and not settings.check_every:
            raise InputError("--gold: the judge is asked at the checks, and there are none; add --set check_every=10")
        if gold:
            require_runnable(call.constitution.principles)
        model, reward = call["model"], call["reward_model"]
        checkpoint = call.out.with_name(f"{call.out.name}.checkpoint")
        with call.directory([call["prompts"], reward, model, gold], [checkpoint]) as target:
            prompts = read_prompts(call["prompts"])[: call.limit]
            dtype = decided_dtype(call.dtype, target.identity, model, "training")
            checked = settings.check_every > 0
            checks = {"gold": of_model(gold) if gold else None, **of_constitution(call.constitution)} if checked else {}
            identity = {
                "verb": "ppo", "model": of_model(model), "reward": of_model(reward), "prompts": of_records(prompts),
                "settings": settings.deciding(), "adapter": adapter.model_dump(), "system": call.system,
                "seed": call.seed, "dtype": dtype, "probes": call["probes"] if checked else None, **checks,
            }  # fmt: skip
            result = target.earlier_result(identity, restart=call.restart)
            if call.restart and distributed.is_main():
                (checkpoint / CHECKPOINT).unlink(missing_ok=True)
            distributed.barrier()  # until the checkpoint is gone for all processes
            again = result is not None and settings.updates <= result["asked_updates"]
            history: list[RolloutSummary] = []
            if not again:
                watch = self._watch(call, settings, prompts) if checked else None
                with call.progress() as step, call.log(settings.model_dump(mode="json")) as log:
                    updates = ppo(
                        prompts, model, reward, target.path, settings=settings, adapter=adapter, system=call.system,
                        seed=call.seed, dtype=dtype, checkpoint=checkpoint, watch=watch, log=log, progress=step, more=checks,
                    )  # fmt: skip
                    history = list(updates)
                result = {
                    "left_out": history[-1].meta.get("left_out", {}) if history else {},
                    "asked_updates": settings.updates,
                    "gamed_after": watch.best.update if watch and watch.checks[-1].bad else None,
                    "lost_sense": bool(watch and watch.checks[-1].lost_sense),
                }
                target.write_result(identity, result)
        assert result is not None
        if again:
            call.tell_there()
        if result["gamed_after"] is not None:
            why = "the policy was losing its sense" if result.get("lost_sense") else "the reward was being gamed"
            call.tell(f"{call.out}: {why}; this is the policy after {result['gamed_after']} updates")
        call.tell_left_out(result["left_out"], "the prompts")
        call.result({"left_out": result["left_out"], "updates": [h.to_json() for h in history]})

    def _watch(self, call: Call, settings: PPOSettings, prompts: Sequence[Prompt]) -> Watch:
        from solon.feedback.judges import open_judge

        probes = prompts[: call["probes"]]
        if not call["gold"]:
            return make_watch(settings, probes, None, None, SenseSettings())
        engine = LazyEngine(call["gold"], system=call.system, dtype=call.dtype)
        judge = open_judge(engine, call.constitution, JudgeSettings(), seed=call.seed)
        return make_watch(settings, probes, engine, judge, SenseSettings())


def make_watch(
    settings: PPOSettings,
    probes: Sequence[Prompt],
    engine: LazyEngine | None,
    judge: Judge | None,
    sense: SenseSettings,
    only: Source | None = None,
) -> Watch:
    """The checks of a training. engine, judge: of the gold judge, which compares the answers to the probes; None: no judge.

    only: the source of the probes whose answers the judge compares; None: of all probes.
    sense: where its embedding model is None or not on this machine, nobody measures whether the answers are about their questions.
    """
    from solon.measures.sense import about_their_questions
    from solon.models.embedding import Embedder
    from solon.reinforcement.monitors import About, Watch, planned_checks

    def gold(pairs: Sequence[Pair]) -> list[Comparison]:
        assert engine is not None and judge is not None
        with engine:  # the judge is in memory only while it is asked
            return list(judge.compare(pairs))

    about: About | None = None
    if sense.embedder is not None:
        try:
            about = partial(about_their_questions, embedder=Embedder.load(sense.embedder))
        except InputError as error:
            note(f"the checks do not measure whether answers are about their questions: {error}")
    planned = planned_checks(settings.updates, settings.check_every)
    return Watch(probes, gold if judge else None, planned=planned, about=about, margin=sense.margin, only=only)
