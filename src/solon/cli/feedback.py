"""Critiques and revisions, labels, scores: what models say of responses, from file to file."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from solon.cli.common import (
    SYSTEM,
    AsJson,
    ConstitutionName,
    Dtype,
    Limit,
    Model,
    Out,
    Quiet,
    Seed,
    System,
    last_line,
    meta,
)
from solon.errors import InputError


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
                few_shot=few_shot, meta=meta(rules, engine, seed, sampling=sampling.to_json()),
            )  # fmt: skip

        made = to_file(out, items, make, RevisionChain, quiet=quiet, what="chains")
    last_line(json_, {"out": str(out), "records": len(made)})


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
            seed=seed or 0, meta=lambda: meta(rules, engine, seed, template=TEMPLATE_FINGERPRINT), limit=limit,
            quiet=quiet,
        )  # fmt: skip
    for finding in result["findings"]:
        print(finding, file=sys.stderr)
    last_line(json_, result)


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
    last_line(json_, {"out": str(out), "records": n})
