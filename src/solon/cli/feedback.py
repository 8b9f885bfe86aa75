"""Critiques and revisions, labels, scores: what models say of responses, from file to file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from solon.cli.common import (
    SYSTEM,
    AsJson,
    ConstitutionName,
    Dtype,
    Limit,
    MaxConnections,
    Model,
    Out,
    Quiet,
    Restart,
    Seed,
    System,
    last_line,
    meta,
)
from solon.engines.base import Sampling
from solon.errors import InputError, Outage, printable
from solon.supervised import SAMPLING

if TYPE_CHECKING:  # torch takes seconds to import
    from solon.runs.files import Outcome


def critique(
    prompts: Annotated[str, typer.Option(help="Prompts (.jsonl), or a shipped set such as solon:red-team.")],
    out: Out,
    constitution: ConstitutionName = "solon",
    model: Model = "smollm2",
    max_connections: MaxConnections = None,
    revisions: Annotated[int, typer.Option(min=1, max=5, help="Critique-and-revision steps.")] = 2,
    direct: Annotated[bool, typer.Option(help="Revise without a critique.")] = False,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="How many of a principle's examples to show; default all, 0 none.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = SAMPLING.max_tokens,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = SAMPLING.temperature,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Sample among the likeliest tokens that hold this probability.")
    ] = SAMPLING.top_p,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help=f"Above 1, a small model repeats itself less; default {SAMPLING.repetition_penalty}, for a server 1.",
        ),
    ] = None,
    system: System = SYSTEM,
    dtype: Dtype = "auto",
    limit: Limit = None,
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Revision chains: response → critique → revision.

    Example: `solon critique --prompts solon:red-team --limit 4 --out chains.jsonl`
    """
    from solon.constitution import load_constitution
    from solon.engines import LazyEngine, is_remote
    from solon.runs.files import critique_file

    rules = load_constitution(constitution)
    penalty = repetition_penalty or (1.0 if is_remote(model) else SAMPLING.repetition_penalty)
    sampling = Sampling(max_tokens, temperature, top_p, penalty)
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        outcome = critique_file(
            prompts, out, engine, rules, revisions=revisions, sampling=sampling, direct=direct, few_shot=few_shot,
            seed=seed or 0, meta=lambda: meta(rules, engine, seed, sampling=sampling.to_json()), limit=limit,
            restart=restart, quiet=quiet,
        )  # fmt: skip
    _end(outcome, out, "chains", json_, {"out": str(out), **outcome.summary()})


def _end(outcome: Outcome, out: Path, what: str, as_json: bool, result: dict[str, Any]) -> None:
    """Say what was made and what was not. Ends with 1 where nothing was answered, or a later start may get the rest."""
    print(outcome.line(out, what), file=sys.stderr)
    last_line(as_json, result)
    if outcome.open:
        raise Outage(f"{out}: {outcome.open} {what} are missing, since the model was out of reach")
    if outcome.nothing:
        kept = "; --restart asks everything again" if outcome.records else ""
        print(
            f"solon: {out}: nothing was answered: {printable(next(iter(outcome.reasons), ''))}{kept}", file=sys.stderr
        )
        raise typer.Exit(1)


def label(
    pairs: Annotated[str, typer.Option(help="Pairs of responses: Solon's, TRL preference or HH form.")],
    out: Out,
    constitution: ConstitutionName = "solon",
    model: Model = "smollm2",
    max_connections: MaxConnections = None,
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
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """AI preference labels for given pairs, in both orders, with soft labels, and how far to trust the judge.

    Example: `solon label --pairs pairs.jsonl --constitution simple --out comparisons.jsonl`
    """
    from solon.constitution import load_constitution
    from solon.data import read_comparisons
    from solon.engines import LazyEngine
    from solon.feedback.judge import JudgeSettings, ModelJudge
    from solon.feedback.questions import TEMPLATE_FINGERPRINT
    from solon.runs.files import label_file

    if not 0 <= clamp[0] <= 0.5 <= clamp[1] <= 1:
        raise InputError(f"--clamp {clamp[0]:g} {clamp[1]:g}: must hold 0.5 between 0 and 1, as 0.4 0.6 does")
    rules = load_constitution(constitution)
    how = JudgeSettings(
        principles_per_pair=principles, together=together, soft_labels=not hard, rationales=rationales, clamp=clamp,
        few_shot=few_shot,
    )  # fmt: skip
    labelled = read_comparisons(examples) if examples else []
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        judge = ModelJudge.of_settings(
            engine, rules, how, labelled, seed=seed or 0,
            meta=lambda: meta(rules, engine, seed, template=TEMPLATE_FINGERPRINT),
        )  # fmt: skip
        scheme: Literal["all", "tournament"] = "tournament" if tournament else "all"
        result = label_file(pairs, out, judge, scheme=scheme, limit=limit, restart=restart, quiet=quiet)
    outcome = result.pop("outcome")
    for finding in result["findings"]:
        print(finding, file=sys.stderr)
    _end(outcome, out, "comparisons", json_, result)


def score(
    reward_model: Annotated[str, typer.Option(help="A reward model written by Solon.")],
    input_: Annotated[str, typer.Option("--input", help="Conversations (TRL `messages`), pairs or comparisons.")],
    out: Out,
    dtype: Dtype = "auto",
    limit: Limit = None,
    restart: Restart = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Reward-model scores: one per conversation, or one per side of a pair.

    Example: `solon score --reward-model reward --input pairs.jsonl --out scores.jsonl`
    """
    from solon.runs.files import score_file

    outcome = score_file(reward_model, input_, out, dtype=dtype, limit=limit, restart=restart, quiet=quiet)
    _end(outcome, out, "scores", json_, {"out": str(out), **outcome.summary()})
