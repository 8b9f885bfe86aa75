"""The contents of the report: titled tables of plain strings, in order. Writers only escape and lay out (`render.py`).

A missing part says "not measured"; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from solon.runs.ledger import cost, left_out
from solon.stages import all_stages
from solon.stages.show_answers import models
from solon.tables import MISSING, Section, clean, counted, duration, estimate, money, number, source, text

KINDS = {"red_team": "red-team", "helpful": "helpful"}


def facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts about the run: label and value."""
    constitution = data.get("constitution") or {}
    named = " ".join(str(constitution[k]) for k in ("name", "version") if constitution.get(k) is not None)
    peak, on_gpu = (
        max((s.get(key) or 0 for s in data.get("stages") or []), default=0)
        for key in ("peak_memory_mb", "peak_gpu_memory_mb")
    )
    memory = f"{number(peak)} MiB{f', and {number(on_gpu)} MiB of a GPU' if on_gpu else ''}" if peak else MISSING
    versions = "; ".join(f"{clean(str(k))} {clean(str(v))}" for k, v in (data.get("versions") or {}).items())
    split = data.get("heldout") or {}
    heldout = "; ".join(f"{KINDS.get(k, k)} {clean(str(v))}" for k, v in (split.get("heldout_from") or {}).items())
    removed = counted(split.get("removed") or {})
    return [
        ("recipe", text(data.get("recipe_name"))),
        ("created", text(data.get("created"))),
        ("start model", text(data.get("model"))),
        ("start model's fingerprint", text(data.get("model_fingerprint"))),
        ("dtype", text(data.get("dtype"))),
        ("seed", "not measured" if data.get("seed") is None else str(data["seed"])),
        ("judge", text(data.get("judge_model"))),
        ("constitution", text(named or None)),
        ("constitution fingerprint", text(constitution.get("fingerprint"))),
        ("principles", number(constitution.get("principles"))),
        ("models compared", ", ".join(map(clean, models(data))) or MISSING),
        ("held-out prompts", text(heldout)),
        ("held-out human comparisons", number(split.get("heldout_comparisons"))),
        ("taken out of training, as the prompt is held out", text(removed or ("nothing" if split else None))),
        ("machine", _machine(data.get("machine") or {})),
        ("memory at most", memory),
        ("wall time since this start", duration(data.get("seconds"))),
        ("versions", text(versions)),
    ]


def _machine(facts: dict[str, Any]) -> str:
    if not facts:
        return MISSING
    gpus = ", ".join(map(clean, map(str, facts.get("gpus") or []))) or "no GPU"
    memory = facts.get("memory_mb")
    size = f"{number(memory / 1024, 1)} GiB of memory" if memory else "memory not known"
    return f"{text(facts.get('cpu'))}, {number(facts.get('cores'))} cores; {gpus}; {size}; {text(facts.get('system'))}"


def sections(data: dict[str, Any]) -> list[Section]:
    """Every table of the report, in its order: the checks, what each stage shows, and the ledger."""
    shown = [section for stage in all_stages() for section in stage.sections(data)]
    first = [s for s in shown if s.first]
    return [_checks(data), *first, *(s for s in shown if not s.first), _stages(data), _left_out(data)]


def _checks(data: dict[str, Any]) -> Section:
    note = (
        "Targets for a run of this recipe, and whether this run reaches them. The 95 % interval decides: where the target "
        "lies inside the interval, the data cannot tell."
    )
    rows = tuple(check_row(c) for c in data.get("checks") or [])
    return Section("Checks", note, ("check", "target", "measured", "outcome", "what to do"), rows)


def check_row(check: dict[str, Any]) -> tuple[str, ...]:
    about = f" ({clean(str(check['about']))})" if check.get("about") else ""
    measured = estimate(check, check.get("unit") or "")
    do = clean(str(check.get("do") or "–"))
    return (text(check.get("name")) + about, text(check.get("target")), measured, text(check.get("outcome")), do)


def _stages(data: dict[str, Any]) -> Section:
    given = data.get("stages") or []
    counts = ("records", "requests", "prompt_tokens", "completion_tokens", "trained_tokens")

    def line(stage: dict[str, Any], name: str, spent: str) -> tuple[str, ...]:
        records, *tokens = (number(stage.get(key)) for key in counts)
        return (name, records, duration(stage.get("seconds")), *tokens, spent)

    rows = [line(s, text(s.get("name")), cost(s)) for s in given]
    if len(given) > 1:
        sums = {key: _sum(s.get(key) for s in given) for key in ("seconds", *counts[1:])}
        name, _, *rest = line(sums, "all stages", _total_cost(given))
        rows.append((name, "–", *rest))  # records of different kinds do not add up
    head = ("stage", "records", "time", "requests", "prompt tokens", "completion tokens", "trained tokens", "cost")
    return Section("Stages", "A total with a part that was not measured is not measured.", head, tuple(rows))


def _total_cost(stages: Sequence[dict[str, Any]]) -> str:
    """The cost of all stages; where the price of a model is not known, the rest of the cost and the model's name."""
    unpriced = sorted({name for s in stages for name in s.get("unpriced") or []})
    known = [s.get("cost_usd") for s in stages if not s.get("unpriced")]
    if any(usd is None for usd in known):
        return MISSING
    spent = money(sum(usd for usd in known if usd is not None))
    return f"{spent} and the cost of {clean(', '.join(unpriced))} (price not known)" if unpriced else spent


def _left_out(data: dict[str, Any]) -> Section:
    given = data.get("stages") or []
    counts = [(text(s.get("name")), *left_out(s)) for s in given]
    rows = tuple(
        (name, number(sum(reasons.values())), number(of), counted(reasons)) for name, reasons, of in counts if reasons
    )
    note = "Items that failed, could not be used or were not answered. Every other stage used all of its items."
    if given and not rows:
        return Section("Left out", "", ("stage", "left out"), (("every stage", "nothing"),))
    return Section("Left out", note, ("stage", "left out", "of", "why"), rows)


def answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Sampled prompts with every model's answer: {"prompt", "source", "answers": [(model, text)]}."""
    return [
        {
            "prompt": text(row.get("prompt")),
            "source": source(row),
            "answers": [(clean(name), _answer((row.get("answers") or {}).get(name))) for name in models(data)],
        }
        for row in data.get("answers") or []
    ]


def _answer(answer: str | None) -> str:
    if answer is None:
        return MISSING
    return clean(answer) if answer.strip() else "(an empty answer)"


def _sum(values: Iterable[Any]) -> Any:
    numbers = list(values)
    return None if any(v is None for v in numbers) else sum(numbers)
