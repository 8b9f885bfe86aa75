"""Judges measured on questions that people answered, and on attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solon.cli.common import SYSTEM, AsJson, Dtype, Limit, MaxConnections, Model, Quiet, Seed, System, last_line
from solon.errors import InputError


def evaluate(
    suite: Annotated[
        str, typer.Option(help="hhh: questions people answered. attacks: texts that try to sway a judge.")
    ],
    model: Model = "smollm2",
    max_connections: MaxConnections = None,
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

    Example: `solon evaluate --suite hhh --file comparisons.jsonl --model judge`
    """
    from solon.analysis import suites
    from solon.constitution import Constitution, load_constitution
    from solon.engines import LazyEngine
    from solon.feedback import attacks
    from solon.feedback.judge import JudgeSettings, ModelJudge
    from solon.feedback.questions import HHH
    from solon.publishing import check_own_json, checked_place, write_json
    from solon.terminal import Console

    if suite not in ("hhh", "attacks"):
        raise InputError(f'--suite "{suite}": the suites are hhh and attacks')
    if sum((pointwise, broken, bool(rationales))) > 1:
        raise InputError("--pointwise, --broken and --rationales are three ways to ask; give one of them")
    if suite == "attacks" and (pointwise or broken):
        raise InputError("--suite attacks compares two responses; leave --pointwise and --broken out")
    if out:
        check_own_json(checked_place(out, [file, model]))
    rules = load_constitution(constitution) if constitution else Constitution.from_question(HHH)
    how = JudgeSettings(principles_per_pair=principles, rationales=rationales, scale="broken" if broken else "levels")
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        judge = ModelJudge(engine, rules, how, seed=seed or 0)
        if suite == "attacks":
            rows = attacks.read_attacks(file or "solon:judge-attacks")[:limit]
            result = attacks.measure(rows, judge.compare)
            table = suites.attacks_table(result, engine.name)
        elif file is None:
            raise InputError("--suite hhh needs --file: the paper's multiple-choice comparisons, or compared pairs")
        else:
            items = suites.read_items(file, seed or 0)[:limit]
            result = suites.measure(items, judge, pointwise=pointwise or broken)
            table = suites.accuracy_table(result)
    Console(quiet=quiet).print(table)
    if suite == "hhh":
        print(result["verdict"])
    if out:
        write_json(out, result)
    last_line(json_, result)
