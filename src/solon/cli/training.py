"""The four trainings, each on its own."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solon import distributed
from solon.cli.common import (
    SYSTEM,
    AsJson,
    ConstitutionName,
    Dtype,
    Limit,
    Out,
    Quiet,
    ReportTo,
    Restart,
    Seed,
    System,
    TrainedModel,
    assignment,
    last_line,
)
from solon.errors import InputError, nearest

if TYPE_CHECKING:  # torch takes seconds to import
    from solon.constitution import Constitution
    from solon.engines import LazyEngine
    from solon.records import Comparison, Pair
    from solon.reinforcement.monitors import Gold
    from solon.training.loop import Progress, TrainSettings


def feedback_model(
    comparisons: Annotated[
        list[str], typer.Option(help="Labelled comparisons (TRL preference, HH, or Solon's); repeatable.")
    ],
    out: Out,
    constitution: ConstitutionName = "solon",
    model: TrainedModel = "smollm2",
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 5e-4,
    max_length: int = 640,
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="Share kept away to measure on.")] = 0.2,
    layers: Annotated[int | None, typer.Option(min=1, help="Adapters on the top so many layers only.")] = None,
    report_to: ReportTo = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Warm a small model up into a judge, and measure it on comparisons that it was not trained on.

    Example: `solon feedback-model --comparisons solon:comparisons-harmless --comparisons solon:comparisons-helpful --out judge`
    """
    from solon.constitution import load_constitution
    from solon.constitution.identity import of_constitution
    from solon.data import read_comparisons
    from solon.data.heldout import split_by_prompt
    from solon.engines.identity import decided_dtype, of_model
    from solon.feedback.feedback_model import train_feedback_model
    from solon.feedback.questions import HHH
    from solon.identity import of_records
    from solon.models.lora import AdapterSettings
    from solon.publishing import directory
    from solon.runs.files import measure_judge
    from solon.training.loop import TrainSettings

    rules = load_constitution(constitution)
    settings = TrainSettings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length)
    with directory(out, [*comparisons, model], [_beside(out)]) as target:
        found = [c for name in comparisons for c in read_comparisons(name)][:limit]
        dtype = decided_dtype(dtype, target.identity, model, "training")
        identity = {
            "verb": "feedback-model", "model": of_model(model), "comparisons": of_records(found),
            **of_constitution(rules), "settings": settings.model_dump(), "layers": layers, "heldout": heldout,
            "system": system, "seed": seed or 0, "dtype": dtype,
        }  # fmt: skip
        training, kept = split_by_prompt(found, heldout, seed or 0)
        result = target.settled(identity, restart=restart)
        again = result is not None
        if result is None:
            with _followed("feedback-model", out, settings, report_to, quiet) as step:
                result = train_feedback_model(
                    training, rules, model, target.path, question=HHH, settings=settings,
                    adapter=AdapterSettings(layers=layers), system=system, seed=seed or 0, dtype=dtype, progress=step,
                )  # fmt: skip
            target.settle(identity, result)
        if kept and distributed.is_main() and "heldout" not in result:
            result["heldout"] = measure_judge(str(target.path), kept, rules, system=system, dtype=dtype)
            target.settle(identity, result)
    _tell_again(out, again)
    _tell_left_out(result["left_out"], "training")
    if "heldout" in result and distributed.is_main():
        said = result["heldout"]["calibration"]["accuracy"]
        if None in (said["value"], said["low"], said["high"]):
            told = "agreement could not be measured: no held-out comparison prefers a side, or the judge answered none"
        else:
            told = f"agrees with {said['value']:.1%} [{said['low']:.1%}, {said['high']:.1%}] of {said['n']} held-out comparisons"
        print(f"{out}: {told}", file=sys.stderr)
    last_line(json_, {"out": str(out), "trained": not again, **result})


def sft(
    data: Annotated[str, typer.Option(help="SFT examples (TRL conversational), or revision chains.")],
    out: Out,
    model: TrainedModel = "smollm2",
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    max_length: int = 512,
    full: Annotated[bool, typer.Option(help="Train all weights instead of LoRA adapters.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Adapters on the top so many layers only.")] = None,
    report_to: ReportTo = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Supervised fine-tuning; writes a complete model.

    Example: `solon sft --data solon:demonstrations-harmless --out sft`
    """
    from solon.data import read_demonstrations, read_revision_chains
    from solon.data.readers import first_line
    from solon.engines.identity import decided_dtype, of_model
    from solon.identity import of_records
    from solon.models.lora import AdapterSettings
    from solon.publishing import directory
    from solon.supervised.dataset import from_chains
    from solon.supervised.sft import sft as train
    from solon.training.loop import TrainSettings

    settings = TrainSettings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length)
    with directory(out, [data, model], [_beside(out)]) as target:
        if "steps" in first_line(data):
            examples, unlearned = from_chains(read_revision_chains(data))
        else:
            examples, unlearned = read_demonstrations(data), {}
        examples = examples[:limit]
        dtype = decided_dtype(dtype, target.identity, model, "training")
        identity = {
            "verb": "sft", "model": of_model(model), "data": of_records(examples), "settings": settings.model_dump(),
            "full": full, "layers": layers, "system": system, "seed": seed or 0, "dtype": dtype,
        }  # fmt: skip
        result = target.settled(identity, restart=restart)
        again = result is not None
        if result is None:
            with _followed("sft", out, settings, report_to, quiet) as step:
                result = train(
                    examples, model, target.path, settings=settings,
                    adapter=None if full else AdapterSettings(layers=layers), system=system, seed=seed or 0,
                    dtype=dtype, progress=step,
                )  # fmt: skip
            result["left_out"] = dict(Counter(unlearned) + Counter(result["left_out"]))
            target.settle(identity, result)
    _tell_again(out, again)
    _tell_left_out(result["left_out"], "training")
    if distributed.is_main():
        print(f"{out}: loss {result['loss_first']:.3f} → {result['loss_last']:.3f}", file=sys.stderr)
    last_line(json_, {"out": str(out), "trained": not again, **result})


def reward_model(
    comparisons: Annotated[str, typer.Option(help="Comparisons (TRL preference, HH, or Solon's).")],
    out: Out,
    model: TrainedModel = "smollm2",
    epochs: int = 1,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    max_length: int = 512,
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="Share kept away to measure on.")] = 0.1,
    layers: Annotated[int | None, typer.Option(min=1, help="Adapters on the top so many layers only.")] = None,
    margin: Annotated[
        float, typer.Option(min=0, help="By which a certain label wants the two scores apart, nats.")
    ] = 0.0,
    skip_ties: Annotated[
        bool, typer.Option(help="Leave labels of 0.5 out; otherwise they pull the two scores together.")
    ] = False,
    human_weight: Annotated[float, typer.Option(min=0, help="Of a person's comparison in the loss.")] = 1.0,
    ai_weight: Annotated[float, typer.Option(min=0, help="Of a judge's.")] = 1.0,
    members: Annotated[int, typer.Option(min=1, max=16, help="Of an ensemble: so many adapters on one trunk.")] = 1,
    uncertainty_penalty: Annotated[
        float, typer.Option(min=0, help="So many standard deviations between the members are taken off the score.")
    ] = 0.0,
    report_to: ReportTo = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Train a reward model on comparisons; loads with AutoModelForSequenceClassification.

    Example: `solon reward-model --comparisons comparisons.jsonl --out reward`
    """
    from solon.data import read_comparisons
    from solon.data.heldout import split_by_prompt
    from solon.engines.identity import decided_dtype, of_model
    from solon.identity import of_records
    from solon.models.lora import AdapterSettings
    from solon.publishing import directory
    from solon.reinforcement.reward_model import RewardModel, RewardSettings, train_reward_model
    from solon.reinforcement.reward_quality import measure

    if uncertainty_penalty and members == 1:
        raise InputError("--uncertainty-penalty: one member cannot disagree with itself; add --members 3")
    settings = RewardSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length, margin=margin,
        ties="skip" if skip_ties else "equal", weights={"human": human_weight, "ai": ai_weight}, members=members,
        uncertainty_penalty=uncertainty_penalty,
    )  # fmt: skip
    with directory(out, [comparisons, model], [_beside(out)]) as target:
        rows = [c for c in read_comparisons(comparisons)[:limit] if c.label is not None]
        dtype = decided_dtype(dtype, target.identity, model, "training")
        identity = {
            "verb": "reward-model", "model": of_model(model), "comparisons": of_records(rows),
            "settings": settings.model_dump(), "layers": layers, "heldout": heldout, "system": system,
            "seed": seed or 0, "dtype": dtype,
        }  # fmt: skip
        training, kept = split_by_prompt(rows, heldout, seed or 0)
        result = target.settled(identity, restart=restart)
        again = result is not None
        if result is None:
            with _followed("reward-model", out, settings, report_to, quiet) as step:
                result = train_reward_model(
                    training, model, target.path, settings=settings, adapter=AdapterSettings(layers=layers),
                    system=system, reference=[(*c.prompt, *s) for c in training[:64] for s in (c.chosen, c.rejected)],
                    seed=seed or 0, dtype=dtype, progress=step,
                )  # fmt: skip
            target.settle(identity, result)
        if kept and distributed.is_main() and "heldout" not in result:
            rewards = RewardModel.load(str(target.path), dtype, "cpu" if distributed.is_sharded() else None)
            result["heldout"] = measure(rewards, kept)
            target.settle(identity, result)
    _tell_again(out, again)
    _tell_left_out(result["left_out"], "training")
    if "heldout" in result and distributed.is_main():
        correct = [right for found in result["heldout"].values() for right in found["correct"]]
        result["heldout_n"] = len(correct)
        result["heldout_accuracy"] = sum(correct) / len(correct) if correct else None
        for source, found in result["heldout"].items():
            right, length = found["calibration"]["accuracy"], found["length_correlation"]["value"]
            follows = "" if length is None else f"; its score's rank correlation with length is {length:+.2f}"
            print(
                f"{out}: right on {found['accuracy']:.1%} [{right['low']:.1%}, {right['high']:.1%}] of {found['n']} "
                f"held-out comparisons ({source}), always the longer on {found['longer_is_better']['value']:.1%}{follows}",
                file=sys.stderr,
            )
    last_line(json_, {"out": str(out), "trained": not again, **result})


def ppo(
    prompts: Annotated[str, typer.Option(help="Prompts (.jsonl), or a shipped set.")],
    reward_model: Annotated[str, typer.Option(help="A reward model written by Solon.")],
    out: Out,
    model: TrainedModel = "smollm2",
    updates: int = 8,
    rollouts: int = 32,
    max_tokens: int = 64,
    learning_rate: float = 1e-4,
    layers: Annotated[int | None, typer.Option(min=1, help="Adapters on the top so many layers only.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other of a recipe's ppo settings, as KEY=VALUE: `--set kl_stop=0.02`."),
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="A judge that checks the policy every --set check_every=K updates.")
    ] = None,
    constitution: Annotated[str, typer.Option(help="Whose principles the gold judge asks.")] = "solon",
    probes: Annotated[int, typer.Option(min=2, help="Prompts that each check asks.")] = 32,
    report_to: ReportTo = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """PPO against a reward model; writes a complete model and a line an update to stderr.

    Example: `solon ppo --prompts solon:helpful --reward-model reward --out rl`
    """
    from solon.constitution import load_constitution
    from solon.constitution.identity import of_constitution
    from solon.data import read_prompts
    from solon.engines import LazyEngine
    from solon.engines.identity import decided_dtype, of_model
    from solon.identity import of_records
    from solon.models.lora import AdapterSettings
    from solon.publishing import directory
    from solon.reinforcement.checkpoint import CHECKPOINT
    from solon.reinforcement.monitors import Watch, planned_checks
    from solon.reinforcement.trainer import GROWS, PPOSettings
    from solon.reinforcement.trainer import ppo as train
    from solon.runs.progress import training_line
    from solon.runs.trackers import trackers
    from solon.terminal import Console

    given = {"updates": updates, "rollouts": rollouts, "max_tokens": max_tokens, "learning_rate": learning_rate}
    more = dict(map(assignment, set_ or []))
    known = list(PPOSettings.model_fields)
    for name in more:
        if name not in known:
            raise InputError(f"--set {name}: no such setting of PPO{nearest(name, known)}")
    settings = PPOSettings.model_validate({**given, **more})
    if gold and not settings.check_every:
        raise InputError("--gold is asked every so many updates; add --set check_every=10")
    kept = out.with_name(f"{out.name}.checkpoint")
    with directory(out, [prompts, reward_model, model, gold], [_beside(out), kept]) as target:
        asked = read_prompts(prompts)[:limit]
        dtype = decided_dtype(dtype, target.identity, model, "training")
        rules = load_constitution(constitution)
        checks = {"gold": of_model(gold) if gold else None, **of_constitution(rules)} if settings.check_every else {}
        identity = {
            "verb": "ppo", "model": of_model(model), "reward": of_model(reward_model), "prompts": of_records(asked),
            "settings": settings.model_dump(exclude=GROWS), "layers": layers, "system": system, "seed": seed or 0,
            "dtype": dtype, "probes": probes if settings.check_every else None, **checks,
        }  # fmt: skip
        result = target.settled(identity, restart=restart)
        if restart and distributed.is_main():
            (kept / CHECKPOINT).unlink(missing_ok=True)
        distributed.barrier()  # until it is gone for all
        again = result is not None and settings.updates <= result["asked_updates"]
        updates_made: list[dict[str, Any]] = []
        if not again:
            watch = None
            if settings.check_every:
                judge = LazyEngine(gold, system=system, dtype=dtype) if gold else None
                watch = Watch(
                    asked[:probes],
                    judged_while_open(judge, rules, seed or 0) if judge else None,
                    planned=planned_checks(settings.updates, settings.check_every),
                )
            curves = (_beside(out), "ppo", report_to or [], settings.model_dump(mode="json"))
            with training_line(Console(stderr=True, quiet=quiet), "ppo") as step, trackers(*curves) as log:
                history = list(
                    train(
                        asked, model, reward_model, target.path, settings=settings,
                        adapter=AdapterSettings(layers=layers), system=system, seed=seed or 0, dtype=dtype,
                        checkpoint=kept, watch=watch, log=log, progress=step, more=checks,
                    )
                )  # fmt: skip
            result = {
                "left_out": history[-1].meta.get("left_out", {}) if history else {},
                "asked_updates": settings.updates,
                "gamed_after": watch.best.update if watch and watch.checks[-1].gamed else None,
            }
            target.settle(identity, result)
            updates_made = [h.to_json() for h in history]
    assert result is not None
    _tell_again(out, again)
    if result["gamed_after"] is not None and distributed.is_main():
        best = result["gamed_after"]
        print(f"{out}: the reward was being gamed; this is the policy after {best} updates", file=sys.stderr)
    _tell_left_out(result["left_out"], "the prompts")
    last_line(json_, {"out": str(out), "left_out": result["left_out"], "updates": updates_made})


def _tell_again(out: Path, again: bool) -> None:
    if again and distributed.is_main():
        print(f"{out}: is there already, made by the same command; --restart makes it anew", file=sys.stderr)


def _beside(out: Path) -> Path:
    """Where the curves of a training go."""
    return out.with_name(f"{out.name}.tensorboard")


def _tell_left_out(left_out: dict[str, int], where: str) -> None:
    if left_out and distributed.is_main():
        told = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        print(f"left out of {where}: {told}", file=sys.stderr)


@contextmanager
def _followed(
    name: str, out: Path, settings: TrainSettings, report_to: list[str] | None, quiet: bool
) -> Iterator[Progress]:
    """A trainer's callback that draws a line on stderr and logs the curves."""
    from solon.runs.progress import training_line
    from solon.runs.trackers import tracked
    from solon.terminal import Console

    given = settings.model_dump(mode="json")
    with (
        training_line(Console(stderr=True, quiet=quiet), name) as step,
        tracked(step, _beside(out), name, report_to or [], given) as both,
    ):
        yield both


def judged_while_open(engine: LazyEngine, constitution: Constitution, seed: int) -> Gold:
    """A judge that is in memory only while it is asked."""
    from solon.feedback.judge import ModelJudge

    judge = ModelJudge(engine, constitution, seed=seed)

    def gold(pairs: Sequence[Pair]) -> list[Comparison]:
        with engine:
            return list(judge.compare(pairs))

    return gold
