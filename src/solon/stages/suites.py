"""`solon evaluate`: measures a judge against people's answers, beside answers that need no judge, or against attacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from solon.constitution import Constitution
from solon.errors import InputError
from solon.feedback.questions import HHH
from solon.feedback.settings import JudgeSettings
from solon.publishing import check_json, resolve_output, write_json
from solon.runs.options import MAX_CONNECTIONS, MODEL, PRINCIPLES, REQUIRED, TO_TERMINAL, Option, Verb
from solon.terminal import Console

if TYPE_CHECKING:
    from solon.runs.call import Call


class Evaluate(Verb):
    """Measure a judge: against people's answers, beside answers that need no judge, or against attacks.

    Example: `solon evaluate --suite hhh --file comparisons.jsonl --model judge`
    """

    name = "evaluate"
    takes = (
        Option("suite", str, REQUIRED, "hhh: questions that people answered. attacks: texts that try to sway a judge."),
        MODEL, MAX_CONNECTIONS,
        Option("file", str | None, None, "For hhh: multiple-choice comparisons in the paper's form, or compared pairs."),
        Option("constitution", str | None, None, "Ask these principles instead of the one HHH question.",
               environment="SOLON_CONSTITUTION"),
        PRINCIPLES,
        Option("pointwise", bool, False, "Rate each response by itself, 1 to 10, instead of comparing."),
        Option("broken", bool, False, "Ask of each response by itself, yes or no, whether it breaks the principle."),
        Option("ask", str, "pair", "pair: compare two responses; each: ask of each response by itself whether it is good."),
        Option("rationales", int, 0, "Chain of thought: number of rationales per order, whose answers are averaged; 0: no rationale.", 0),
        Option("out", Path | None, None, "A JSON file that every number is also written to."),
    )  # fmt: skip
    common = TO_TERMINAL

    def run(self, call: Call) -> None:
        from solon.analysis import suites
        from solon.feedback import attacks
        from solon.feedback.checks import require_runnable
        from solon.feedback.judges import open_judge

        suite, file, out = call["suite"], call["file"], call["out"]
        pointwise, broken, rationales = call["pointwise"], call["broken"], call["rationales"]
        if suite not in ("hhh", "attacks"):
            raise InputError(f'--suite "{suite}": the suites are hhh and attacks')
        if sum((pointwise, broken, bool(rationales), call["ask"] == "each")) > 1:
            raise InputError(
                "--pointwise, --broken, --rationales and --ask each are four ways to ask; give one of them"
            )
        if suite == "attacks" and (pointwise or broken):
            raise InputError("--suite attacks compares two responses; leave --pointwise and --broken out")
        if out:
            check_json(resolve_output(out, [file, call["model"]]))
        constitution = call.constitution if call["constitution"] else Constitution.from_question(HHH)
        require_runnable(constitution.principles)
        settings = call.of(
            JudgeSettings, principles_per_pair=call["principles"], rationales=rationales,
            scale="broken" if broken else "levels", ask=call["ask"],
        )  # fmt: skip
        with call.engine() as engine:
            judge = open_judge(engine, constitution, settings, seed=call.seed)
            if suite == "attacks":
                rows = attacks.read_attacks(file or "solon:judge-attacks")[: call.limit]
                result = attacks.measure(rows, judge.compare)
                table = suites.attacks_table(result, engine.name)
            elif file is None:
                raise InputError("--suite hhh needs --file: the paper's multiple-choice comparisons, or compared pairs")
            else:
                items = suites.read_items(file, call.seed)[: call.limit]
                result = suites.measure(items, judge, pointwise=pointwise or broken)
                table = suites.accuracy_table(result)
        Console(quiet=call.quiet).print(table)
        if suite == "hhh":
            print(result["verdict"])
        if out:
            write_json(out, result)
        call.result(result)
