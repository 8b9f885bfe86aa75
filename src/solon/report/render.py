"""A finished run as Markdown, as one HTML file, and as a table for the terminal.

All three say the same, because all three print the same cells: `sections` turns the report's data into
titled tables of plain strings, and each writer only escapes and lays out. A part that is missing says "not
measured"; nothing is filled in. Prompts and answers are a model's text, so nothing in them is ever markup:
HTML is escaped by jinja2 under a policy that allows no script and no request, Markdown by
`escape_markdown`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table as RichTable
from rich.text import Text

from solon.report.plots import reliability

MISSING = "not measured"
PPO_ROWS = 12  # of a long run, the table shows this many updates, first and last among them
DIGITS = {"%": 1, "points": 1, "words": 1, "sd": 2}  # decimals by unit; 3 where the unit is none of these
BETTER = {"higher": "higher", "lower": "lower"}
OUTCOMES = {True: "holds", False: "does not hold", None: MISSING}
CURVES = {
    "reward": "reward (sd)",
    "kl_nats": "KL to the reference (nats a response)",
    "entropy_nats": "entropy (nats a token)",
    "response_tokens": "response (tokens)",
    "clip_fraction": "clip fraction",
    "explained_variance": "values explain (share)",
    "kl_coefficient": "KL coefficient",
}
WATCHED = {
    "watched.evasive": "evasive (share)",
    "watched.boilerplate": "stock phrases (share)",
    "watched.phrase_share": "share one phrase",
    "watched.distinct_3": "distinct-3",
}


@dataclass(frozen=True)
class Section:
    """A titled table of plain strings; no rows says that the part was not measured."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    points: tuple[str, ...] = ()  # sentences before the table
    plot: str = ""  # an <svg> element out of numbers alone, shown in HTML only: the table has its numbers
    level: int = 2  # of the title; 3: part of the section before


@dataclass(frozen=True)
class Curve:
    """One value of PPO over its updates, drawn in a box of 300 by 80."""

    title: str
    lines: tuple[str, ...]  # points of one SVG polyline each; broken where a value is missing
    low: str
    high: str


# --- numbers -----------------------------------------------------------------------------------------------


def number(value: Any, digits: int | None = None) -> str:
    """A number for a person, or "not measured". digits: decimals; None gives three significant figures."""
    if value is None:
        return MISSING
    if not isinstance(value, (int, float)):
        return clean(str(value))
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if isinstance(value, int):
        return f"{value:,}"
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def estimate(found: dict[str, Any] | None, unit: str = "", scale: float = 1.0) -> str:
    """`12.5 % [8.1, 17.3], n = 48`; without a value, "not measured". scale: 100 for a share in %."""
    if not found or found.get("value") is None:
        n = (found or {}).get("n")
        return MISSING if n is None else f"{MISSING}, n = {number(n)}"
    digits = DIGITS.get(unit, 3)
    value, low, high = (None if found.get(k) is None else scale * float(found[k]) for k in ("value", "low", "high"))
    interval = "no interval" if low is None or high is None else f"{number(low, digits)}, {number(high, digits)}"
    n = found.get("n")
    return f"{number(value, digits)}{f' {clean(unit)}' if unit else ''} [{interval}], n = {number(n)}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `12 min 5 s`, `1 h 02 min`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def money(usd: float | None) -> str:
    """US dollars, to the cent, or to four figures below one."""
    if usd is None:
        return MISSING
    return f"${usd:,.2f}" if usd == 0 or abs(usd) >= 1 else f"${usd:.4f}"


# Control characters and the marks that reorder text (Unicode Bidi_Control); newline and tab stay.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Text without control characters, each shown as U+FFFD, so that no terminal or browser acts on one."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n"))


# --- what the report says ----------------------------------------------------------------------------------


def facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was: label and value."""
    rules = data.get("constitution") or {}
    named = " ".join(str(rules[k]) for k in ("name", "version") if rules.get(k) is not None)
    return [
        ("recipe", _text(data.get("recipe_name"))),
        ("created", _text(data.get("created"))),
        ("start model", _text(data.get("model"))),
        ("constitution", _text(named or None)),
        ("constitution fingerprint", _text(rules.get("fingerprint"))),
        ("principles", number(rules.get("principles"))),
        ("models compared", ", ".join(map(clean, models(data))) or MISSING),
    ]


def models(data: dict[str, Any]) -> list[str]:
    """The models' names in the run's order; where none are listed, those that a measure names."""
    named = data.get("models") or [m for row in data.get("measures") or [] for m in row.get("values") or {}]
    return list(dict.fromkeys(map(str, named)))


def sections(data: dict[str, Any]) -> list[Section]:
    """Every table of the report, in its order."""
    return [
        _checks(data),
        *_measures(data),
        _differences(data),
        *_reward_model(data),
        *_judge(data),
        *_trust(data),
        *_ppo(data),
        _stages(data),
        _principles(data),
    ]


def _checks(data: dict[str, Any]) -> Section:
    rows = (
        (
            _text(c.get("name")),
            _text(c.get("target")),
            number(c.get("value")),
            number(c.get("n")),
            _outcome(c),
        )
        for c in data.get("checks") or []
    )
    note = "What a run of this recipe should show, and whether this one does."
    return Section("Checks", note, ("check", "target", "value", "n", "outcome"), tuple(rows))


def _outcome(check: dict[str, Any]) -> str:
    return OUTCOMES.get(check.get("holds"), MISSING) if check.get("value") is not None else MISSING


def _measures(data: dict[str, Any]) -> list[Section]:
    groups: dict[bool | None, tuple[str, str]] = {
        False: (
            "Measures that nothing was trained on",
            "Only these can catch training being gamed. Value [95 % interval], n = answers.",
        ),
        True: (
            "Measures that training pushed on",
            "Reward model and judge trained these models: a rise here is expected and proves little alone.",
        ),
        None: ("Other measures", "The data does not say whether training pushed on these."),
    }
    given = data.get("measures") or []
    found = []
    for trained_on, (title, note) in groups.items():
        rows = tuple(_measure(m, models(data)) for m in given if m.get("trained_on") is trained_on)
        if rows or trained_on is not None:
            found.append(Section(title, note, ("measure", "better", *map(clean, models(data))), rows))
    return found


def _measure(row: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    values = row.get("values") or {}
    unit = row.get("unit") or ""
    better = BETTER.get(row.get("better") or "", "–")
    return (_text(row.get("name")), better, *(estimate(values.get(name), unit) for name in names))


def _differences(data: dict[str, Any]) -> Section:
    rows = tuple((clean(step), estimate(found, "sd")) for step, found in (data.get("differences") or {}).items())
    note = "Mean difference of the held-out reward, prompt by prompt."
    return Section("Held-out reward, step by step", note, ("step", "difference"), rows)


def _reward_model(data: dict[str, Any]) -> list[Section]:
    trained = data.get("reward_model") or {}
    rows = tuple(
        (
            _source(r),
            estimate(r.get("accuracy"), "%", 100.0),
            estimate(r.get("longer_is_better"), "%", 100.0),
            estimate(r.get("length_correlation")),
            estimate(_at(r, "calibration.calibration_error")),
            estimate(_at(r, "calibration.overconfidence")),
        )
        for r in trained.get("by_source") or []
    )
    note = (
        "How often the reward model prefers the response that the held-out label favours (chance is 50 %), beside always "
        "preferring the longer one; how far its score follows length (rank correlation, 0: not at all); and whether its "
        "probabilities mean what they say (0 at best; above 0 in the last it is too sure)."
    )
    head = ("comparisons", "right", "longer is right", "follows length", "calibration error", "too sure by")
    found = [Section("Reward model", note, head, rows)]
    labels = {
        "comparisons": "comparisons trained on",
        "abstained": "comparisons without a label",
        "loss_first": "first loss (nats)",
        "loss_last": "last loss (nats)",
    }
    known = tuple((label, number(trained[key])) for key, label in labels.items() if key in trained)
    if known:
        found.append(Section("Reward model training", "", ("", "value"), known))
    return found


def _judge(data: dict[str, Any]) -> list[Section]:
    """The judge as reports had it before trust was measured."""
    judge = data.get("judge")
    if not judge:
        return []
    labels = {
        "accuracy": "agrees with the person",
        "choose_longer": "choosing the longer response would",
        "flips": "changes its mind when the order is swapped",
    }
    rows = [(label, estimate(judge.get(key), "%", 100.0)) for key, label in labels.items()]
    rows.append(("abstentions", number(judge.get("abstained"))))
    note = "On held-out human comparisons, each under its own principle, in both orders; chance is 50 %."
    return [Section("Judge", note, ("", "value"), tuple(rows))]


# --- the judge ---------------------------------------------------------------------------------------------

TRUST_PARTS = {"labels": "labels of this run", "heldout": "held-out human comparisons"}
# what is shown, where it stands in the summary of `feedback.trust`, its unit and scale
TRUST_ROWS = (
    ("contradicts itself when the order is swapped", "position.contradictions", "%", 100.0),
    ("prefers what is shown first", "position.first_shown", "%", 100.0),
    ("being shown first adds (log-odds)", "position.bias", "", 1.0),
    ("prefers the longer response, in words", "length.words.judge", "%", 100.0),
    ("… people, on the pairs they decided", "length.words.people", "%", 100.0),
    ("… judge less people, on these", "length.words.difference", "points", 100.0),
    ("prefers the longer response, in characters", "length.characters.judge", "%", 100.0),
    ("prefers its own response", "self_preference.judge", "%", 100.0),
    ("… people, on the pairs they decided", "self_preference.people", "%", 100.0),
    ("… judge less people, on these", "self_preference.difference", "points", 100.0),
    ("sees its own better response more often than another's, by", "self_preference.opportunity_gap", "points", 100.0),
    ("principles agree with each other", "agreement.mean", "%", 100.0),
    ("ties, of pairs", "ties.pairs", "%", 100.0),
    ("ties, of judgements", "ties.judgements", "%", 100.0),
    ("abstentions, of pairs", "abstentions.pairs", "%", 100.0),
    ("abstentions, of judgements", "abstentions.judgements", "%", 100.0),
    ("agrees with people", "calibration.accuracy", "%", 100.0),
)
CALIBRATION_ROWS = (
    ("agrees with people", "accuracy", "%", 100.0),
    ("Cohen's kappa", "kappa", "", 1.0),
    ("confidence less share right", "overconfidence", "", 1.0),
    ("Brier score", "brier", "", 1.0),
    ("log loss (nats)", "log_loss", "", 1.0),
    ("expected calibration error", "calibration_error", "", 1.0),
)


def _trust(data: dict[str, Any]) -> list[Section]:
    """Can the judge be trusted? Left out where no judge was measured."""
    parts = {name: found for key, name in TRUST_PARTS.items() if (found := (data.get("trust") or {}).get(key))}
    if not parts:
        return []
    said = tuple(
        f"{name[0].upper()}{name[1:]}: {sentence}"
        for name, found in parts.items()
        for sentence in found.get("findings") or ["None of the faults that are looked for was found."]
    )
    rows = [
        (label, *(estimate(_at(found, path), unit, scale) for found in parts.values()))
        for label, path, unit, scale in TRUST_ROWS
        if any(_at(found, path) for found in parts.values())
    ]
    reasons = [
        "; ".join(f"{_text(k)}: {number(n)}" for k, n in (_at(found, "abstentions.reasons") or {}).items())
        for found in parts.values()
    ]
    if any(reasons):
        rows.append(("reasons of abstentions (judgements)", *(text or "–" for text in reasons)))
    note = (
        "Value [95 % interval], n. A judge that throws a coin contradicts itself in 50 % and prefers what is shown "
        "first in 50 %; a longer response may be better, so people's share stands beside the judge's."
    )
    first = Section("Can the judge be trusted?", note, ("judge", *parts), tuple(rows), said)
    found = [first]
    for key, name in TRUST_PARTS.items():
        if name in parts:
            found += _against_people(key, name, parts[name]) + _by_principle(name, parts[name])
    return found


def _against_people(key: str, name: str, trust: dict[str, Any]) -> list[Section]:
    """How well the judge's probabilities fit people's choices."""
    measured = trust.get("calibration") or {}
    if not measured.get("n"):
        return []
    shown = {"all pairs": measured}
    note = (
        "P(first is better) against people's choice. Confidence is that of the favoured side; Brier score, log loss "
        "and calibration error are 0 at best. With so many pairs a perfectly calibrated judge has a calibration error "
        f"under {number(measured.get('error_by_chance'), 3)} in 95 of 100 samples."
    )
    if fitted := measured.get("temperature"):
        shown |= {"other half": fitted.get("before"), "other half, recalibrated": fitted.get("after")}
        bound = " (the bound of the search)" if fitted.get("at_bound") else ""
        note += (
            f" One temperature, fitted on about half of the pairs ({number(fitted.get('n_fit'))}), is "
            f"{number(fitted.get('value'))}{bound}; above 1 the judge was too sure. Log loss that it saves on the other "
            f"half: {estimate(fitted.get('log_loss_saved'))}."
        )
    rows = tuple(
        (label, *(estimate(_at(found, path), unit, scale) if _at(found, path) else "–" for found in shown.values()))
        for label, path, unit, scale in CALIBRATION_ROWS
    )
    bins = measured.get("bins") or []
    curve = tuple(
        (
            f"{number(b.get('low'), 2)} to {number(b.get('high'), 2)}",
            number(b.get("confidence"), 3),
            estimate(b.get("right"), "%", 100.0),
        )
        for b in bins
    )
    plot = reliability(bins, f"reliability-{key}") if bins else ""
    return [
        Section(f"Judge against people: {name}", note, ("", *shown), rows, level=3),
        Section(f"Reliability: {name}", "", ("confidence", "mean", "right"), curve, plot=plot, level=3),
    ]


def _by_principle(name: str, trust: dict[str, Any]) -> list[Section]:
    """A row a principle, how often every two of them agree, and who won by author."""
    rows = tuple(
        (
            _text(p.get("principle")),
            "verified, no model asked" if p.get("kind") == "check" else "model",
            number(p.get("n")),
            number(p.get("abstained")),
            number(p.get("ties")),
            estimate(p["confidence"]) if p.get("confidence") else "–",
            estimate(p.get("agrees_with_people"), "%", 100.0),
        )
        for p in trust.get("principles") or []
    )
    head = ("principle", "judged by", "judgements", "abstained", "ties", "mean |log-odds|", "agrees with people")
    found = [Section(f"Judge by principle: {name}", "", head, rows, level=3)] if rows else []
    if cells := _at(trust, "agreement.cells"):
        names = sorted({c["a"] for c in cells} | {c["b"] for c in cells})
        at = {(c["a"], c["b"]): c for c in cells}
        matrix = tuple(
            (f"{i}. {_text(a)}", *(_agreement(at.get((a, b))) if a < b else "" for b in names[1:]))
            for i, a in enumerate(names[:-1], 1)
        )
        note = (
            f"Share of pairs on which two principles decide alike; Cohen's kappa; pairs. Mean kappa: "
            f"{number(_at(trust, 'agreement.mean_kappa'), 2)}."
        )
        columns = ("principle", *(f"{i}. {_text(b)}" for i, b in enumerate(names[1:], 2)))
        found.append(Section(f"Agreement between principles: {name}", note, columns, matrix, level=3))
    if authors := trust.get("authors"):
        wins = tuple((_text(a.get("author")), estimate(a.get("wins"), "%", 100.0)) for a in authors)
        found.append(Section(f"Wins by author: {name}", "", ("author", "preferred by the judge"), wins, level=3))
    return found


def _agreement(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return f"{100 * cell['agree']['value']:.0f} %; {number(cell['kappa']['value'], 2)}; {number(cell['agree']['n'])}"


def _at(found: Any, path: str) -> Any:
    """What stands at a path such as `position.bias`; None where it does not."""
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


# --- training ----------------------------------------------------------------------------------------------


def _ppo(data: dict[str, Any]) -> list[Section]:
    updates = data.get("ppo") or []
    shown = updates
    if len(updates) > PPO_ROWS:
        steps = {round(i * (len(updates) - 1) / (PPO_ROWS - 1)) for i in range(PPO_ROWS)}
        shown = [updates[i] for i in sorted(steps)]
    rows = tuple((number(u.get("update")), *(number(u.get(key)) for key in CURVES)) for u in shown)
    note = f"{len(shown)} of {len(updates)} updates; means over each update's rollouts." if updates else ""
    found = [Section(_text(data.get("algorithm") or "ppo").upper(), note, ("update", *CURVES.values()), rows)]
    if any(u.get("watched") for u in updates):
        said = tuple(
            (
                number(u.get("update")),
                *(number(_at(u, key)) for key in WATCHED),
                _text(_at(u, "watched.phrase")),
            )
            for u in shown
        )
        note = "Measures of the rollouts' words; a phrase of five words that many answers share is a sign of a gamed reward."
        found.append(Section("What the rollouts say", note, ("update", *WATCHED.values(), "the phrase"), said, level=3))
    checks = [u["check"] for u in updates if u.get("check")]
    if checks:
        rows = tuple(
            (
                number(c.get("updates")),
                estimate(c.get("reward"), "sd"),
                estimate(c.get("gold"), "%", 100.0),
                number(c.get("abstained")),
                number(c.get("over_refusal")),
                "yes" if c.get("gamed") else "no",
            )
            for c in checks
        )
        note = (
            "The same probe prompts after so many updates: the reward of the answers, how often the judge prefers them to "
            "the start's, and whether the reward has risen while the judge's preference fell since the best check."
        )
        head = ("updates", "reward", "preferred to the start", "abstained", "benign refused (share)", "reward gamed")
        found.append(Section("Checks while training", note, head, rows, level=3))
    return found


def _stages(data: dict[str, Any]) -> Section:
    given = data.get("stages") or []
    counts = ("records", "prompt_tokens", "completion_tokens", "trained_tokens")

    def line(name: str, stage: dict[str, Any]) -> tuple[str, ...]:
        records, *tokens = (number(stage.get(key)) for key in counts)
        return (name, records, duration(stage.get("seconds")), *tokens, money(stage.get("cost_usd")))

    rows = [line(_text(s.get("name")), s) for s in given]
    if len(given) > 1:
        sums = {key: _sum(s.get(key) for s in given) for key in ("seconds", *counts[1:], "cost_usd")}
        name, _, *rest = line("all stages", sums)
        rows.append((name, "–", *rest))  # records of different kinds do not add up
    head = ("stage", "records", "time", "prompt tokens", "completion tokens", "trained tokens", "cost")
    return Section("Stages", "A total with a part that was not measured is not measured.", head, tuple(rows))


def _principles(data: dict[str, Any]) -> Section:
    rows = (
        (
            _text(p.get("id")),
            number(p.get("revisions")),
            number(p.get("comparisons")),
            number(p.get("mean_label"), 3),
        )
        for p in data.get("principles") or []
    )
    note = "Mean label: P(first response is better), asked in both orders; over many comparisons about 0.5."
    head = ("principle", "revisions", "comparisons", "mean label")
    return Section("Principles", note, head, tuple(rows))


def answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Sampled prompts with every model's answer: {"prompt", "source", "answers": [(model, text)]}."""
    return [
        {
            "prompt": _text(row.get("prompt")),
            "source": _source(row),
            "answers": [(clean(name), _said((row.get("answers") or {}).get(name))) for name in models(data)],
        }
        for row in data.get("answers") or []
    ]


def curves(data: dict[str, Any]) -> list[Curve]:
    """A curve a value of PPO that has at least two finite points side by side."""
    updates = data.get("ppo") or []
    return [c for key, title in CURVES.items() if (c := _curve(title, [u.get(key) for u in updates])).lines]


def _curve(title: str, values: Sequence[Any]) -> Curve:
    finite = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if len(finite) < 2:
        return Curve(title, (), "", "")
    low, high = min(finite), max(finite)
    segments: list[list[str]] = [[]]
    for i, v in enumerate(values):
        if isinstance(v, (int, float)) and math.isfinite(v):
            y = 40.0 if high == low else 76 - 72 * (v - low) / (high - low)
            segments[-1].append(f"{2 + 296 * i / (len(values) - 1):.1f},{y:.1f}")
        else:
            segments.append([])
    return Curve(title, tuple(" ".join(s) for s in segments if len(s) > 1), number(float(low)), number(float(high)))


def _text(value: Any) -> str:
    return MISSING if value is None or value == "" else clean(str(value))


def _source(row: dict[str, Any]) -> str:
    return _text(row.get("source")).replace("red_team", "red-team")


def _said(answer: str | None) -> str:
    if answer is None:
        return MISSING
    return clean(answer) if answer.strip() else "(an empty answer)"


def _sum(values: Iterable[Any]) -> Any:
    found = list(values)
    return None if any(v is None for v in found) else sum(found)


# --- Markdown ----------------------------------------------------------------------------------------------

# Brackets alone are text, so intervals are legible; what makes links, images or notes of them is escaped.
_PUNCTUATION = re.compile(r"([\\`*_{}#|~]|!(?=\[)|\[(?=[\[^!])|(?<=\])[(:\[])")
_ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "$": "&#36;",
    "@": "&#64;",
}  # $: math, @: mentions and mail


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no HTML, link, code or cell border; newlines: <br>."""
    safe = _PUNCTUATION.sub(r"\\\1", clean(text).strip())
    safe = re.sub(r"[&<>$@]", lambda m: _ENTITIES[m.group()], safe)
    # GitHub links bare addresses
    safe = re.sub(r"(?i)\b(www)\.", r"\1&#46;", safe.replace("://", "&#58;//"))
    return re.sub(r"[ \t]*[\n\u2028\u2029][ \t]*", "<br>", safe)


def render_markdown(data: dict[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown."""
    md = escape_markdown
    lines = [f"# {md(_text(data.get('name')))}", ""]
    lines += [f"> **Note.** {md(str(w))}\n" for w in data.get("warnings") or []]
    lines += [*(f"- {md(label)}: {md(value)}" for label, value in facts(data)), ""]
    for section in sections(data):
        lines += [f"{'#' * section.level} {md(section.title)}", ""]
        if not section.rows:
            lines += [MISSING, ""]
            continue
        lines += [*(f"- {md(point)}" for point in section.points), ""] if section.points else []
        lines += [md(section.note), ""] if section.note else []
        head, *rows = ("| " + " | ".join(map(md, row)) + " |" for row in (section.head, *section.rows))
        lines += [head, "|" + " --- |" * len(section.head), *rows, ""]
    lines += ["## Answers side by side", ""]
    shown = answers(data)
    for i, row in enumerate(shown, 1):
        lines += [f"### {i}. {md(row['source'])}", "", f"**prompt:** {md(row['prompt'])}", ""]
        lines += [f"- **{md(name)}:** {md(text)}" for name, text in row["answers"]] + [""]
    if not shown:
        lines += [MISSING, ""]
    return "\n".join(lines)


# --- HTML --------------------------------------------------------------------------------------------------


def render_html(data: dict[str, Any]) -> str:
    """The report as one HTML file: no script, no request, light or dark as the reader's system is."""
    environment = Environment(
        loader=PackageLoader("solon.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=_text(data.get("name")),
        warnings=[clean(str(w)) for w in data.get("warnings") or []],
        facts=facts(data),
        sections=sections(data),
        curves=curves(data),
        answers=answers(data),
        missing=MISSING,
    )


# --- terminal ----------------------------------------------------------------------------------------------


def summary_table(data: dict[str, Any]) -> RichTable:
    """Measures by models for the terminal; those that nothing was trained on come first."""
    table = RichTable(
        title=Text(_text(data.get("name"))), caption=Text("value [95 % interval]; * training pushed on it")
    )
    names = models(data)
    table.add_column("measure")
    for name in names:
        table.add_column(Text(clean(name)), justify="right")
    for row in sorted(data.get("measures") or [], key=lambda r: bool(r.get("trained_on"))):
        name, _, *cells = _measure(row, names)
        table.add_row(Text(name + (" *" if row.get("trained_on") else "")), *map(Text, cells))
    if not table.row_count:
        table.add_row(MISSING)
    return table
