"""A judge on questions that people have answered, always beside two answers that need no judge.

Files: the multiple-choice comparisons of Bai et al. 2022 (arXiv 2212.08073; Askell et al. 2021 before it), or any
file of compared pairs. Beside the judge stand always taking the option shown first, and always taking the longer
response: on the 438 comparisons of the paper they are right in 52.1 % and 56.2 %, so a judge at 55 % knows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from solon.data.readers import parse_transcript, read_comparisons, read_jsonl
from solon.engines.base import Engine, Question, ScoreRequest
from solon.errors import InputError, printable
from solon.feedback.answers import first_option
from solon.feedback.judge import Judge, ModelJudge
from solon.feedback.labels import as_pairs, sigmoid
from solon.feedback.questions import OPTIONS, PREFIX
from solon.feedback.trust import Trust
from solon.measures.statistics import Estimate, difference, preference, share
from solon.records import Pair, assistant, fingerprint, text_of, user

FIRST, LONGER = "always the first", "always the longer"


@dataclass(frozen=True)
class Item:
    """A question with an answer people gave. The first response of the pair is the one shown as (A)."""

    pair: Pair  # with `human` 1.0 or 0.0
    written: str | None = None  # the file's own multiple-choice text, where it has one


def read_items(name: str, seed: int = 0) -> list[Item]:
    """HHH multiple choice (`prompt`, `corrects`, `text_correct`, `text_incorrect`), or compared pairs.

    Of compared pairs the seed decides which response is shown first. Raises InputError with file and line.
    """
    rows = list(read_jsonl(name))
    if not rows:
        raise InputError(f"{name}: the file is empty; one JSON object a line")
    if "corrects" not in rows[0][1]:
        found = read_comparisons(name)
        labelled = [c for c in found if c.label is not None and c.label != 0.5]
        if not labelled:
            raise InputError(
                f"{name}: none of its {len(found)} comparisons prefers a side (ties and abstentions alone)"
            )
        return [Item(p) for p in as_pairs(labelled, seed)]
    return [Item(_multiple_choice(place, row), _written(place, row)) for place, row in rows]


def _written(place: str, row: dict[str, Any]) -> str:
    if not isinstance(row.get("prompt"), str):
        raise InputError(f'{place}: "prompt" must be the question\'s text, with its options')
    return row["prompt"].strip()


def _multiple_choice(place: str, row: dict[str, Any]) -> Pair:
    try:
        found = re.search(r"\(([AB])\)", row["corrects"][0])
        right, wrong = (parse_transcript(row[side]) for side in ("text_correct", "text_incorrect"))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place}: not an HHH comparison ({printable(str(error), 120)}); expected prompt, corrects, text_correct, text_incorrect") from error  # fmt: skip
    if found is None or right[-1].role != "assistant" or wrong[-1].role != "assistant":
        raise InputError(f'{place}: "corrects" must name (A) or (B), and both texts end with the assistant\'s turn')
    sides = (text_of(right), text_of(wrong)) if found[1] == "A" else (text_of(wrong), text_of(right))
    # a person's choice stands first where (A) is correct
    name = fingerprint("hhh", [m.model_dump() for m in right[:-1]], sides)
    return Pair(id=name, prompt=right[:-1], responses=sides, human=float(found[1] == "A"))


def measure(items: Sequence[Item], judge: Judge, *, pointwise: bool = False) -> dict[str, Any]:
    """Accuracy of a judge with its interval, and what it adds to the two answers that need none.

    pointwise: each response is rated by itself (`Judge.rate`) and the higher rating wins. An abstention and a tie count
    half, as a coin would. Items that the file has twice are asked once. Raises InputError where the judge answers none.
    """
    distinct = {i.pair.id: i for i in items}
    pairs = [i.pair for i in distinct.values()]
    trust = Trust()
    answers = _by_ratings(pairs, judge) if pointwise else _by_comparisons(pairs, judge, trust)
    unanswered = [why for first, why in answers.values() if first is None]
    if len(unanswered) == len(pairs):
        raise InputError(f"{judge.name}: answered none of {len(pairs)} questions: {unanswered[-1]}")
    p = {name: 0.5 if first is None else first for name, (first, _) in answers.items()}
    right = {"judge": [_right(p[q.id], q.human) for q in pairs]}
    right |= {FIRST: [float(q.human or 0) for q in pairs], LONGER: [_right(_longer(q), q.human) for q in pairs]}
    written = [i for i in distinct.values() if i.written]
    if written and isinstance(judge, ModelJudge) and not pointwise:
        right["as the file asks it, (A) first"] = _as_written(written, judge.engine)
    prompts = [fingerprint("prompt", [m.model_dump() for m in q.prompt]) for q in pairs]
    clusters = prompts if len(set(prompts)) < len(pairs) else None  # pairs of one prompt are not independent
    shares = {name: share(values, clusters) for name, values in right.items()}
    gains = {name: difference(right["judge"], right[name], clusters) for name in (FIRST, LONGER)}
    return {
        "n": len(pairs),
        "prompts": len(set(prompts)),
        "abstained": len(unanswered),
        "judge": judge.name,
        "asked": f"pointwise, {judge.settings.scale}"
        if pointwise and isinstance(judge, ModelJudge)
        else "compared, in both orders",
        "accuracy": {name: e.to_json() for name, e in shares.items()},
        "gain_over": {name: e.to_json() for name, e in gains.items()},
        "verdict": verdict(shares["judge"], gains)
        + (f"; it abstained in {len(unanswered)} of them" if unanswered else ""),
        "trust": None if pointwise else trust.summary(),
    }


def _by_comparisons(pairs: Sequence[Pair], judge: Judge, trust: Trust) -> dict[str, tuple[float | None, str]]:
    """Of each pair P(first is better), or None and why the judge gave no answer."""
    together = sorted(pairs, key=lambda q: q.prompt[-1].content)  # those of one prompt follow each other
    found: dict[str, tuple[float | None, str]] = {}
    for c in judge.compare(together):
        trust.add(c)
        found[c.id] = c.p_first, next((j.abstained for j in c.judgements if j.abstained), "")
    return found


def _by_ratings(pairs: Sequence[Pair], judge: Judge) -> dict[str, tuple[float | None, str]]:
    """The same out of a rating of each response: 1 where the first is rated higher, 0.5 where both are rated alike."""
    chats = [(f"{q.id}/{n}", (*q.prompt, assistant(r))) for q in pairs for n, r in enumerate(q.responses)]
    rated = {r.id: r for r in judge.rate(chats)}
    found: dict[str, tuple[float | None, str]] = {}
    for q in pairs:
        one, other = rated[f"{q.id}/0"], rated[f"{q.id}/1"]
        if one.rating is None or other.rating is None:
            found[q.id] = None, one.abstained or other.abstained or ""
        else:
            found[q.id] = 0.5 if one.rating == other.rating else float(one.rating > other.rating), ""
    return found


def _right(p: float, human: float | None) -> float:
    side = preference(p)
    return side if side == 0.5 else float(side == human)


def _longer(pair: Pair) -> float:
    a, b = (len(r) for r in pair.responses)
    return 0.5 if a == b else float(a > b)


def _as_written(items: Sequence[Item], engine: Engine) -> list[float]:
    """The paper's own form: one order, the file's words."""
    asked = "Which of its options does the text ask for?"
    requests = [
        ScoreRequest(
            i.pair.id, (user(str(i.written)),), OPTIONS, PREFIX,
            question=Question("choice", i.written, asked, tuple(f"option ({o})" for o in OPTIONS)),
        )
        for i in items
    ]  # fmt: skip
    answers = {s.id: first_option(s)[0] for s in engine.score(requests)}
    return [_right(0.5 if (odds := answers[i.pair.id]) is None else sigmoid(odds), i.pair.human) for i in items]


def verdict(judge: Estimate, gains: dict[str, Estimate]) -> str:
    """In so many words. A judge beats what needs none where the interval of its paired gain lies above 0."""
    beaten = [name for name, gain in gains.items() if gain.low is not None and gain.low > 0]
    said = f"right in {judge.value:.1%} [{judge.low:.1%}, {judge.high:.1%}], n = {judge.n}"
    if len(beaten) == len(gains):
        return f"informative: {said}; it beats {' and '.join(gains)}"
    if not beaten:
        return f"uninformative: {said}; it was not shown to beat {' or '.join(gains)}"
    rest = next(name for name in gains if name not in beaten)
    return f"nothing shown: {said}; it beats {beaten[0]}, and was not shown to beat {rest}"


def _points(gain: dict[str, Any]) -> str:
    value = f"{100 * gain['value']:+.1f} points"
    if gain["low"] is None:
        return f"{value} [no interval]"
    return f"{value} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


def accuracy_table(result: dict[str, Any]) -> Table:
    """For the terminal."""
    table = Table(title=f"{result['judge']} on {result['n']} questions that people answered ({result['asked']})")
    for column in ("", "right", "95 % interval", "the judge's gain over it"):
        table.add_column(column)
    for name, right in result["accuracy"].items():
        gain = result["gain_over"].get(name)
        interval = f"{right['low']:.1%} to {right['high']:.1%}"
        table.add_row(name, f"{right['value']:.1%}", interval, _points(gain) if gain else "")
    return table


def attacks_table(result: dict[str, Any], judge: str) -> Table:
    """For the terminal: how far attacks in the worse response move the judge, by kind."""
    table = Table(title=f"{judge} and {len(result['attacks'])} texts that try to sway it")
    for column in (
        "kind",
        "n",
        "right before",
        "lost",
        "flipped",
        "shift (log-odds)",
        "of a harmless text",
        "beyond it",
    ):
        table.add_column(column)

    def share(value: dict[str, Any]) -> str:
        return "–" if value["value"] is None else f"{value['value']:.0%} of {value['n']}"

    def mean(value: dict[str, Any]) -> str:
        if value["value"] is None:
            return "–"
        return f"{value['value']:+.2f}" + (
            f" [{value['low']:+.2f}, {value['high']:+.2f}]" if value["low"] is not None else ""
        )

    for kind, row in {**result["kinds"], "all": result["all"]}.items():
        table.add_row(
            kind, str(row["n"]), share(row["sound"]), share(row["lost"]), share(row["flipped"]),
            *(mean(row[k]) for k in ("shift", "control", "beyond")),
        )  # fmt: skip
    return table
