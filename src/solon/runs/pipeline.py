"""The whole pipeline, stage by stage, as the papers tell it. A recipe decides which stages run and on what.

    warmup → feedback-model → revisions (→ choices) → sl-cai → pairs → comparisons → reward-model → ppo → evaluation

Each function below is one stage. It reads what earlier stages left in the run directory, and calls the method's
own code; `Run` wraps journal, resume, progress and cost around it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from solon import __version__
from solon.analysis.kl import kl_of_written
from solon.constitution import Constitution
from solon.constitution.identity import of_constitution
from solon.data.heldout import prompt_keys, split_comparisons, taught_keys
from solon.engines import Failure, GenerationRequest, LazyEngine, is_remote
from solon.engines.base import Engine
from solon.engines.identity import of_model
from solon.errors import InputError
from solon.feedback.feedback_model import train_feedback_model
from solon.feedback.judge import ModelJudge, asked_constitution
from solon.feedback.labels import as_pairs
from solon.feedback.principles import own_principles
from solon.feedback.questions import HHH, TEMPLATE_FINGERPRINT
from solon.feedback.rating import JudgeReward
from solon.feedback.trust import Trust
from solon.human.validation import draw_validation_sample
from solon.identity import of_chats, of_inputs
from solon.models.dtype import Work, decide
from solon.models.lora import AdapterSettings
from solon.models.weights import resolve
from solon.records import (
    Comparison,
    Pair,
    Prompt,
    RevisionChain,
    RolloutSummary,
    SFTExample,
    assistant,
    fingerprint,
)
from solon.reinforcement.alternatives import train_otherwise
from solon.reinforcement.checkpoint import CHECKPOINT, updates_in
from solon.reinforcement.monitors import Watch, planned_checks
from solon.reinforcement.reward_model import RewardModel, train_reward_model
from solon.reinforcement.reward_quality import measure
from solon.reinforcement.trainer import ppo
from solon.runs.data import Data
from solon.runs.evaluation import evaluate
from solon.runs.journal import Journal, read_journal
from solon.runs.ledger import counted
from solon.runs.recipe import Recipe, load_recipe
from solon.runs.run import Run
from solon.runs.trackers import Log, tracked, trackers
from solon.supervised.critique_revision import revise
from solon.supervised.dataset import contests, from_chains, from_choices, from_demonstrated_revisions, mix
from solon.supervised.sft import sft
from solon.terminal import note
from solon.training.loop import Progress, TrainSettings

R = TypeVar("R")


@dataclass(frozen=True)
class Results:
    """What the stages of a run found, for its report."""

    models: dict[str, str]  # by name, from "start" to the last: what `--model` takes
    evaluation: dict[str, Any]
    trust: dict[str, Any]  # how far the judge can be trusted, by what it judged
    kl: dict[str, Any]  # of the policy that was written
    split: dict[str, Any]  # what was held out, and what was taken out of training for it


def run_stages(run: Run, asked_dtype: str | None = None) -> Results:
    """Run every stage of the run's recipe, or what is left of them. asked_dtype: as `chosen` takes it."""
    recipe = run.recipe
    data = Data(recipe)
    run.claim("inputs.json", json.dumps(data.inputs(), indent=1) + "\n")
    for line in chosen(recipe, data, asked_dtype):
        run.say(line)
    models = {"start": start_model(run)}
    run.claim("models.json", json.dumps(models_used(recipe, models["start"]), indent=1) + "\n")
    model = models["start"]
    if recipe.warmup:
        model = warmup(run, data, model)
    judge = None
    if recipe.feedback.labels != "human":
        judge = feedback_model(run, data, model)
    if recipe.supervised:
        chains = revisions(run, data, model)
        model = sl_cai(run, data, chains, model, judge)
    if model != models["start"]:
        models["SL-CAI" if recipe.supervised else "SFT"] = model
    comparisons: list[Comparison] = []
    pairs: list[Pair] = []
    judged: list[Comparison] = []
    if judge:
        judged = check_judge(run, data, judge)
        pairs = sample_pairs(run, data, model)
        if not recipe.feedback.direct:
            comparisons = label(run, data, pairs, judge)
    learned, kept_out = to_learn_from(run, data, comparisons)
    rewards: JudgeReward | str
    if recipe.feedback.direct:
        assert judge is not None
        rewards = judge_reward(run, data, pairs, judge)
    else:
        rewards = reward_model(run, data, learned, kept_out, pairs, model)
    written = reinforce(run, data, learned, model, rewards, judge)
    models[reinforced_name(recipe)] = written
    kl = kl_to_reference(run, data, written, model)
    scorer = RewardModel.load(rewards, dtype=recipe.dtype) if isinstance(rewards, str) else rewards
    with open_lazily(run, judge or model) as engine:
        ask = partial(judge_of(run, data, engine).compare, failed=run.fail) if judge else None
        scored_by = {"reward": of_reward(rewards)}
        evaluation = evaluate(run, data.heldout, models, scorer, engine if judge else None, ask, scored_by)
    if recipe.human.validation_sample:
        draw_validation_sample(run.dir / "validation", comparisons, recipe.human.validation_sample, recipe.seed)
    given = {"labels": comparisons, "heldout": judged}
    trust = {name: judge_trust(found, judge) for name, found in given.items() if judge and found}
    return Results(models, evaluation, trust, kl, data.split())


def chosen(recipe: Recipe, data: Data, asked_dtype: str | None = None) -> Iterator[str]:
    """What this run takes where the recipe leaves it open, and what it holds out: a few lines for a person.

    asked_dtype: the dtype before it was decided, where that was done.
    """
    measured = " (auto: the faster one here)" if asked_dtype == "auto" else ""
    yield f"model {recipe.model}, dtype {recipe.dtype}{measured}, seed {recipe.seed}, {reinforced_name(recipe)} by {recipe.algorithm}"
    if recipe.feedback.labels != "human":
        own = "the model in training" if recipe.feedback.judge == "self" else recipe.feedback.judge
        warmed = ", first trained on the human comparisons" if recipe.feedback.warmup else ""
        yield f"judge: {own}{warmed}"
    yield from data.told()


def models_used(recipe: Recipe, start: str) -> dict[str, str]:
    """The fingerprint of each model that the recipe names: a resumed run must have the same weights."""
    judge = "" if recipe.feedback.judge == "self" or recipe.feedback.labels == "human" else recipe.feedback.judge
    named = {"model": start, "feedback.judge": judge, "gold.judge": recipe.gold.judge or ""}
    return {role: of_model(spec)["fingerprint"] for role, spec in named.items() if spec}


def resolved(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with each `auto` dtype decided once for the whole run, however often it is resumed."""
    wanted: dict[str, str] = {"dtype": recipe.dtype, "training_dtype": recipe.training_dtype or recipe.dtype}
    works: dict[str, Work] = {"dtype": "generation", "training_dtype": "training"}
    kept = out / "recipe.yaml"
    before = load_recipe(str(kept)).model_dump() if kept.is_file() else {}
    for name, work in works.items():
        if wanted[name] == "auto":
            wanted[name] = before.get(name) or decided(recipe.model, work)
    return recipe.model_copy(update=wanted)


def decided(model: str, work: Work) -> str:
    """The dtype for this work with the run's own model; float32 where the model is not in this process."""
    return "float32" if is_remote(model) else decide(resolve(model), work)


def reinforced_name(recipe: Recipe) -> str:
    return "RL-CAI" if recipe.supervised else "RLHF" if recipe.feedback.labels == "human" else "RLAIF"


def start_model(run: Run) -> str:
    """The recipe's model; `tiny-random` is made on the spot (for tests: it knows nothing)."""
    if run.recipe.model != "tiny-random":
        return run.recipe.model
    from solon.models.tiny import make_tiny_model

    return str(make_tiny_model(run.model("start"), seed=run.recipe.seed))


def warmup(run: Run, data: Data, model: str) -> str:
    """SFT on what people demonstrated: answers, and how to criticise and revise.

    A weak model's own critiques are noise; it first learns from people what one is. A strong model skips this.
    """
    part = run.recipe.warmup
    assert part is not None
    revised, left_out = from_demonstrated_revisions(data.revision_demonstrations, run.constitution)
    examples = data.demonstrations + revised
    return _sft_stage(run, "warmup", examples, model, part.train, part.adapter, left_out=left_out)


def revisions(run: Run, data: Data, model: str) -> list[RevisionChain]:
    """response → critique → revision, 1..N times, on the training prompts."""
    part = run.recipe.supervised
    assert part is not None
    with open_lazily(run, model) as engine, open_lazily(run, start_model(run)) as start:

        def make(batch: Sequence[Prompt]) -> Iterator[RevisionChain]:
            return revise(
                batch,
                engine,
                run.constitution,
                revisions=part.revisions,
                sampling=part.sampling.sampling(),
                seed=run.recipe.seed,
                direct=not part.critique,
                few_shot=part.few_shot,
                responder=start if part.responder == "start" else None,
                meta=provenance(run, engine, sampling=part.sampling.model_dump()),
                failed=run.fail,
            )

        return run.records("revisions", data.prompts, make, RevisionChain, engines=(engine, start), what="chains")


def choose(run: Run, data: Data, chains: Sequence[RevisionChain], judge: str) -> list[Comparison]:
    """The judge compares each chain's last revision with its response, under the principle it was revised by."""
    known = {p.id: p for p in run.constitution.principles}
    asked = {c.id: [known[c.steps[-1].principle]] for c in chains}
    with open_lazily(run, judge) as engine:
        make = partial(judge_of(run, data, engine).compare, asked=asked, failed=run.fail)
        return run.records("choices", contests(chains), make, Comparison, engines=(engine,), what="choices")


def sl_cai(run: Run, data: Data, chains: Sequence[RevisionChain], model: str, judge: str | None) -> str:
    """SFT on the revisions, with some demonstrations kept in so that nothing is forgotten."""
    part = run.recipe.supervised
    assert part is not None
    if part.sft_on == "best":
        assert judge is not None
        learned, left_out = from_choices(chains, choose(run, data, chains, judge))
    else:
        learned, left_out = from_chains(chains, part.sft_on)
    if not learned:
        raise InputError(
            f"sl-cai: none of the {sum(left_out.values())} revisions is whole ({counted(left_out)}; "
            f"supervised.sampling.max_tokens: {part.sampling.max_tokens}); raise it, or use a model that ends its answers"
        )
    examples = mix(learned, data.demonstrations, part.demonstration_share)
    return _sft_stage(run, "sl-cai", examples, model, part.train, left_out=left_out)


def feedback_model(run: Run, data: Data, model: str) -> str:
    """The judge; warmed up on human comparisons first where the recipe says so."""
    part = run.recipe.feedback
    judge = model if part.judge == "self" else part.judge
    if part.warmup is None:
        return judge
    settings, out = part.warmup, run.model("feedback-model")

    def work(step: Progress) -> dict[str, Any]:
        with _curves(run, "feedback-model", step, settings) as step:
            return train_feedback_model(
                data.comparisons,
                asked_of_judge(run),
                judge,
                out,
                question=part.question or HHH,
                settings=settings,
                adapter=part.adapter or run.recipe.adapter,
                system=run.recipe.system,
                seed=run.recipe.seed,
                dtype=run.recipe.learning_dtype,
                progress=step,
            )

    made_from = {"judge": of_model(judge), "comparisons": of_inputs(data.comparisons)}
    run.once("feedback-model", work, makes=out, made_from=made_from)
    return str(out)


def check_judge(run: Run, data: Data, judge: str) -> list[Comparison]:
    """What the judge says of human comparisons that nothing was trained on, asked as the recipe asks it.

    Each is judged under its own principle where the run's constitution has that, else as any pair of this run.
    """
    human = data.heldout_comparisons
    pairs = as_pairs(human, run.recipe.seed)
    drawn, seed = run.recipe.feedback.principles_per_pair, run.recipe.seed
    asked, others = own_principles(human, asked_of_judge(run), principles=drawn, seed=seed)
    if others:
        note(
            f"{others} of {len(human)} held-out human comparisons were made under no principle of this run's "
            "constitution; they are judged under its own"
        )
    with open_lazily(run, judge) as engine:
        make = partial(judge_of(run, data, engine).compare, asked=asked, failed=run.fail)
        return run.records("judge-heldout", pairs, make, Comparison, engines=(engine,), what="comparisons")


def judge_trust(comparisons: Sequence[Comparison], judge: str) -> dict[str, Any]:
    """How far the judge can be trusted, by what it said of these."""
    trust = Trust(judge)
    for comparison in comparisons:
        trust.add(comparison)
    return trust.summary()


def judge_of(run: Run, data: Data, engine: LazyEngine) -> ModelJudge:
    """The judge that every stage of a run asks: the recipe's question or principles, its examples, its labels."""
    return ModelJudge.of_settings(
        engine, run.constitution, run.recipe.feedback.judging(), data.comparisons, seed=run.recipe.seed,
        meta=lambda: provenance(run, engine, template=TEMPLATE_FINGERPRINT),
    )  # fmt: skip


def asked_of_judge(run: Run) -> Constitution:
    return asked_constitution(run.constitution, run.recipe.feedback.judging())


def sample_pairs(run: Run, data: Data, model: str) -> list[Pair]:
    """Two responses a prompt, from the supervised model."""
    part = run.recipe.feedback
    with open_lazily(run, model) as engine:

        def make(batch: Sequence[Prompt]) -> Iterator[Pair]:
            requests = [
                GenerationRequest(f"{p.id}/{n}", p.prompt, seed=run.recipe.seed) for p in batch for n in range(2)
            ]
            made = {c.id: c for c in engine.generate(requests, part.sampling.sampling())}
            meta = provenance(run, engine, sampling=part.sampling.model_dump())
            for p in batch:
                first, second = made[f"{p.id}/0"], made[f"{p.id}/1"]
                if (error := first.error or second.error) is not None:
                    run.fail(Failure(p.id, error, first.again or second.again))
                    continue
                yield Pair(
                    id=p.id,
                    prompt=p.prompt,
                    responses=(first.text, second.text),
                    source=p.source,
                    meta={**meta, "ended": [first.ended, second.ended]},
                )

        prompts = _first(data.prompts, part.n_prompts)
        return run.records("pairs", prompts, make, Pair, engines=(engine,), what="pairs")


def label(run: Run, data: Data, pairs: Sequence[Pair], judge: str) -> list[Comparison]:
    """The judge compares each pair under principles, in both orders."""
    differing = [p for p in pairs if p.responses[0].strip() != p.responses[1].strip()]
    alike = {"the two responses are the same": len(pairs) - len(differing)} if len(pairs) > len(differing) else {}
    with open_lazily(run, judge) as engine:
        make = partial(judge_of(run, data, engine).compare, failed=run.fail)
        return run.records(
            "comparisons", differing, make, Comparison, engines=(engine,), what="comparisons", left_out=alike
        )


def to_learn_from(run: Run, data: Data, ai: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """The comparisons that the recipe's labels name, and those of the judge that are kept away to measure on.

    No prompt is on both sides, neither of the judge's comparisons nor of people's.
    """
    recipe = run.recipe
    kept = list(ai)
    random.Random(recipe.seed).shuffle(kept)
    kept_out, training = split_comparisons(
        kept, round(recipe.reward_model.heldout_ai * len(kept)), "reward_model.heldout_ai"
    )
    held = {key for c in kept_out for key in prompt_keys(c.prompt)}
    if recipe.feedback.labels == "human":
        training = []
    if recipe.feedback.labels != "ai":
        training += [c for c in data.comparisons if not taught_keys(c.prompt) & held]
    return training, kept_out


def reward_model(
    run: Run,
    data: Data,
    training: Sequence[Comparison],
    kept_out: Sequence[Comparison],
    pairs: Sequence[Pair],
    supervised: str,
) -> str:
    """Train on the labels the recipe names, measure on comparisons that were kept away from training. Its directory."""
    part, out = run.recipe.reward_model, run.model("reward-model")
    reference = [(*p.prompt, assistant(r)) for p in pairs for r in p.responses] or [
        (*c.prompt, *side) for c in data.comparisons for side in (c.chosen, c.rejected)
    ]

    def work(step: Progress) -> dict[str, Any]:
        with _curves(run, "reward-model", step, part.train) as step:
            result = train_reward_model(
                training,
                supervised,
                out,
                settings=part.train,
                adapter=run.recipe.adapter,
                system=run.recipe.system,
                reference=reference[:128],
                seed=run.recipe.seed,
                dtype=run.recipe.learning_dtype,
                progress=step,
            )
        rewards = RewardModel.load(str(out), dtype=run.recipe.dtype)
        return {**result, "heldout": measure(rewards, [*data.heldout_comparisons, *kept_out])}

    made_from = {
        "model": of_model(supervised), "comparisons": of_inputs(training), "reference": of_chats(reference),
        "held out": of_inputs([*data.heldout_comparisons, *kept_out]),
    }  # fmt: skip
    run.once("reward-model", work, makes=out, made_from=made_from)
    return str(out)


def judge_reward(run: Run, data: Data, pairs: Sequence[Pair], judge: str) -> JudgeReward:
    """Direct RLAIF: the judge's rating is the reward, in standard deviations of its ratings of the sampled pairs."""
    engine = open_lazily(run, judge)
    part = run.recipe.feedback
    rewards = JudgeReward(judge_of(run, data, engine))
    reference = [(*p.prompt, assistant(r)) for p in pairs for r in p.responses][:128]
    other = "; try feedback.scale: broken" if part.scale == "levels" else ""

    def work(step: Progress) -> dict[str, Any]:
        rewards.normalise(reference)
        if rewards.abstained == rewards.rated:
            raise InputError(
                f"feedback.direct: {engine.name} rated none of {rewards.rated} responses: {rewards.why}{other}"
            )
        return {
            "examples": len(reference), "abstained": rewards.abstained, "mean": rewards.mean, "std": rewards.std
        }  # fmt: skip

    made_from = {"judge": of_model(judge), "reference": of_chats(reference)}
    result = run.once("judge-reward", work, engines=(engine,), made_from=made_from)
    rewards.mean, rewards.std = result["mean"], result["std"]
    return rewards


def of_reward(rewards: JudgeReward | str) -> dict[str, str]:
    """What PPO climbs: a reward model by its content, a judge with its scale and what its ratings are measured in."""
    if isinstance(rewards, str):
        return of_model(rewards)
    made = of_model(rewards.judge.name)
    scale = (scale_of(rewards), rewards.mean, rewards.std)
    return {"name": made["name"], "fingerprint": fingerprint("judge's reward", made["fingerprint"], scale)}


def engines_of(rewards: JudgeReward | str) -> list[Engine]:
    """The engine that a reward asks; none where it is a reward model."""
    return [rewards.judge.engine] if isinstance(rewards, JudgeReward) and isinstance(rewards.judge, ModelJudge) else []


def scale_of(rewards: JudgeReward) -> str:
    return rewards.judge.settings.scale if isinstance(rewards.judge, ModelJudge) else ""


def watch(run: Run, data: Data, engine: LazyEngine | None) -> Watch | None:
    """The probe prompts, half of them red-team, and the engine that judges the answers to them."""
    recipe = run.recipe
    if not recipe.ppo.check_every:
        return None
    planned = planned_checks(recipe.ppo.updates, recipe.ppo.check_every)
    half = recipe.gold.probes // 2
    probes = [p for source in ("red_team", "helpful") for p in [p for p in data.prompts if p.source == source][:half]]
    if engine is None:
        return Watch(probes, planned=planned)

    def gold(pairs: Sequence[Pair]) -> list[Comparison]:
        with engine:  # the judge is in memory only while it is asked
            return list(judge_of(run, data, engine).compare(pairs))

    return Watch(probes, gold, planned=planned)


def reinforce(
    run: Run,
    data: Data,
    comparisons: Sequence[Comparison],
    model: str,
    rewards: JudgeReward | str,
    judge: str | None,
) -> str:
    """PPO against the reward, with a KL penalty towards the supervised model; or what the recipe has in its place."""
    recipe, out = run.recipe, run.model("rl-cai")
    assert recipe.adapter is not None
    common: dict[str, Any] = {
        "settings": recipe.ppo, "adapter": recipe.adapter, "system": recipe.system, "seed": recipe.seed,
        "dtype": recipe.learning_dtype,
    }  # fmt: skip
    stage = recipe.algorithm
    spec = recipe.gold.judge or judge
    gold = open_lazily(run, spec) if spec and recipe.ppo.check_every else None
    watched = watch(run, data, gold)
    judges = {
        "judge": None if isinstance(rewards, str) else {**of_model(rewards.judge.name), "scale": recipe.feedback.scale},
        "gold": of_model(spec) if spec and recipe.ppo.check_every else None,
        **of_constitution(asked_of_judge(run)),
    }
    made_from = {
        "model": of_model(model),
        "reward": of_reward(rewards),
        **({"comparisons": of_inputs(comparisons)} if stage == "dpo" else {}),
        **({"gold": of_model(gold.name)} if gold else {}),
    }
    run.take_up(stage, made_from)  # before its journal is opened: what was made from something else is set aside
    check_updates(run, stage)
    with Journal(run.path(stage)) as journal:

        def train(step: Progress, log: Log) -> Iterable[RolloutSummary]:
            if recipe.algorithm == "ppo":
                reward = rewards if isinstance(rewards, str) else rewards.score
                kept = run.path("ppo", "checkpoint")
                return ppo(
                    data.prompts,
                    model,
                    reward,
                    out,
                    checkpoint=kept,
                    watch=watched,
                    log=log,
                    progress=step,
                    more=judges,
                    **common,
                )
            score = (
                RewardModel.load(rewards, recipe.learning_dtype).score if isinstance(rewards, str) else rewards.score
            )
            return train_otherwise(
                recipe.algorithm, data.prompts, comparisons, model, score, out, log=log, progress=step, **common
            )

        def work(step: Progress) -> dict[str, Any]:
            config = recipe.ppo.model_dump(mode="json")
            with trackers(run.dir / "tensorboard", stage, recipe.report_to, config) as log:
                for summary in train(step, log):
                    journal.append({"id": f"update-{summary.update}", **summary.to_json()})
            history = sorted((RolloutSummary.model_validate(r) for r in journal.records), key=lambda u: u.update)
            learned_from = comparisons if recipe.algorithm == "dpo" else data.prompts
            return {**reinforced(history, recipe, watched), "left_out_of": len(learned_from)}

        asked = [*engines_of(rewards), *([gold] if gold else [])]
        run.once(stage, work, engines=asked, total=recipe.ppo.updates, what="updates", makes=out, made_from=made_from)
    return str(out)


def reinforced(history: Sequence[RolloutSummary], recipe: Recipe, watched: Watch | None) -> dict[str, Any]:
    """The stage's result: what its updates used, what was left out, and which policy is written."""
    sampled = sum((h.response_tokens or 0.0) * h.meta["rollouts"] for h in history)
    prompts = sum(h.meta["prompt_tokens"] for h in history)
    gamed = bool(watched and watched.checks[-1].gamed)
    return {
        "examples": len(history),
        "tokens": round(prompts + sampled) * recipe.ppo.epochs,
        "usage": (prompts, round(sampled)),
        "left_out": history[-1].meta.get("left_out", {}) if history else {},
        # Of the last update's rollouts, before its steps: the KL of what is written is measured by the stage `kl`.
        "last_rollouts_kl_nats": history[-1].kl_nats if history else None,
        # The best check's where the last one found the reward gamed.
        "written_after": watched.best.update if watched and gamed else len(history),
        "gamed": gamed,
    }


def check_updates(run: Run, stage: str) -> None:
    """Where summaries of updates are gone from the journal, the stage begins anew: an update is not made by itself."""
    state, checkpoint = run.state(stage), run.path(stage, "checkpoint")
    done = state["records"] if state.get("done") else updates_in(checkpoint)
    there = {row["id"] for _, row in read_journal(run.path(stage))}
    if gone := {f"update-{n}" for n in range(done)} - there:
        (checkpoint / CHECKPOINT).unlink(missing_ok=True)
        run.reopen(stage, f"{len(gone)} of {done} updates are gone from {run.path(stage)}")


def kl_to_reference(run: Run, data: Data, policy: str, reference: str) -> dict[str, Any]:
    """The KL of the policy that was written to the model it started from, on the held-out prompts."""
    settings = run.recipe.ppo

    def work(step: Progress) -> dict[str, Any]:
        return kl_of_written(
            policy,
            reference,
            data.heldout,
            system=run.recipe.system,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            seed=run.recipe.seed,
            dtype=run.recipe.dtype,
            progress=step,
        )

    made_from = {"policy": of_model(policy), "reference": of_model(reference)}
    return run.once("kl", work, total=2 * len(data.heldout), what="responses read", made_from=made_from)


def _sft_stage(
    run: Run,
    stage: str,
    examples: Sequence[SFTExample],
    model: str,
    train: TrainSettings,
    adapter: AdapterSettings | None = None,
    *,
    left_out: Mapping[str, int],
) -> str:
    """left_out: by reason, what taught nothing and is not among the examples; beside what training itself leaves out."""
    out = run.model(stage)

    def work(step: Progress) -> dict[str, Any]:
        with _curves(run, stage, step, train) as step:
            result = sft(
                examples,
                model,
                out,
                settings=train,
                adapter=adapter or run.recipe.adapter,
                system=run.recipe.system,
                seed=run.recipe.seed,
                dtype=run.recipe.learning_dtype,
                progress=step,
            )
        return {**result, "left_out": dict(Counter(left_out) + Counter(result.get("left_out") or {}))}

    run.once(stage, work, makes=out, made_from={"model": of_model(model), "examples": of_inputs(examples)})
    return str(out)


def _curves(run: Run, stage: str, step: Progress, settings: TrainSettings) -> AbstractContextManager[Progress]:
    return tracked(step, run.dir / "tensorboard", stage, run.recipe.report_to, settings.model_dump(mode="json"))


def open_lazily(run: Run, spec: str) -> LazyEngine:
    return LazyEngine(spec, system=run.recipe.system, dtype=run.recipe.dtype)


def provenance(run: Run, engine: Engine, **more: Any) -> dict[str, Any]:
    """What stands in each record's `meta`."""
    return {
        "constitution": run.constitution.fingerprint,
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "seed": run.recipe.seed,
        "solon": __version__,
        **more,
    }


def _first(rows: list[R], n: int | None) -> list[R]:
    return rows if n is None else rows[:n]
