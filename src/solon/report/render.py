"""A finished run as Markdown, as one HTML file, and as a table for the terminal.

All three print the same cells: `sections` turns the report's data into titled tables of plain strings, and each writer
only escapes and lays out. Prompts and answers are text of people and models, so nothing in them is markup: jinja2
escapes HTML, under a policy that allows no script and no request, and `escape_markdown` escapes Markdown.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table as RichTable
from rich.text import Text

from solon.report.sections import answers, check_row, facts, sections
from solon.runs.ledger import left_out_line
from solon.stages.show_answers import measure_row, models
from solon.stages.show_reinforcement import curves
from solon.tables import MISSING, Section, clean, text

# --- Markdown ----------------------------------------------------------------------------------------------

# Brackets stay, so intervals are legible; the characters that make links, images or notes of brackets are escaped.
_PUNCTUATION = re.compile(r"([\\`*_{}#|~]|!(?=\[)|\[(?=[\[^!])|(?<=\])[(:\[])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "@": "&#64;"}  # $: math, @: mentions and mail


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
    lines = [f"# {md(text(data.get('name')))}", ""]
    lines += [f"**{md(str(data['headline']))}**", ""] if data.get("headline") else []
    lines += [f"> **Note.** {md(str(w))}\n" for w in data.get("warnings") or []]
    lines += [*(f"- {md(label)}: {md(value)}" for label, value in facts(data)), ""]
    for section in sections(data):
        lines += [f"{'#' * section.level} {md(section.title)}", "", *section_markdown(section)]
    lines += ["## Answers side by side", ""]
    shown = answers(data)
    for i, row in enumerate(shown, 1):
        lines += [f"### {i}. {md(row['source'])}", "", f"**prompt:** {md(row['prompt'])}", ""]
        lines += [f"- **{md(name)}:** {md(text)}" for name, text in row["answers"]] + [""]
    if not shown:
        lines += [MISSING, ""]
    return "\n".join(lines)


def section_markdown(section: Section) -> list[str]:
    """A section's lines, without its title."""
    md = escape_markdown
    if not section.rows:
        return [MISSING, ""]
    lines = [*(f"- {md(point)}" for point in section.points), ""] if section.points else []
    lines += [md(section.note), ""] if section.note else []
    head, *rows = ("| " + " | ".join(map(md, row)) + " |" for row in (section.head, *section.rows))
    return [*lines, head, "|" + " --- |" * len(section.head), *rows, ""]


# --- HTML --------------------------------------------------------------------------------------------------


def render_html(data: dict[str, Any]) -> str:
    """The report as one HTML file without script or request, light or dark by the reader's system."""
    environment = Environment(
        loader=PackageLoader("solon.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=text(data.get("name")),
        headline=clean(str(data.get("headline") or "")),
        warnings=[clean(str(w)) for w in data.get("warnings") or []],
        facts=facts(data),
        sections=sections(data),
        curves=curves(data),
        answers=answers(data),
        missing=MISSING,
    )


# --- terminal ----------------------------------------------------------------------------------------------


def summary_table(data: dict[str, Any]) -> RichTable:
    """Measures by models for the terminal; measures that training did not push on come first."""
    names, caption = models(data), Text("value [95 % interval]; * training pushed on it")
    table = RichTable(title=Text(text(data.get("name"))), caption=caption)
    table.add_column("measure")
    for name in names:
        table.add_column(Text(clean(name)), justify="right")
    for row in sorted(data.get("measures") or [], key=lambda r: bool(r.get("trained_on"))):
        name, _, *cells = measure_row(row, names)
        table.add_row(Text(name + (" *" if row.get("trained_on") else "")), *map(Text, cells))
    if not table.row_count:
        table.add_row(MISSING)
    return table


def checks_table(data: dict[str, Any]) -> RichTable:
    """The checks for the terminal: target, measured value with its interval, outcome."""
    caption = Text("measured [95 % interval]: the interval decides")
    table = RichTable("check", "target", "measured", "outcome", title="Checks", caption=caption)
    for check in data.get("checks") or []:
        table.add_row(*map(Text, check_row(check)[:4]))
    if not table.row_count:
        table.add_row(MISSING)
    return table


def summary_lines(data: dict[str, Any]) -> list[str]:
    """The lines after the tables in the terminal: headline, advice of the checks, left-out items, notes."""
    lines = [str(data["headline"])] if data.get("headline") else []
    lines += [f"{c['name']}: {c['outcome']}; {c['do']}" for c in data.get("checks") or [] if c.get("do")]
    lines += [line for stage in data.get("stages") or [] if (line := left_out_line(stage))]
    return [clean(line) for line in [*lines, *(f"note: {w}" for w in data.get("warnings") or [])]]
