"""The report: hostile text stays text, missing parts are said, every number appears."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from solon.errors import InputError
from solon.report.render import (
    checks_table,
    escape_markdown,
    render_html,
    render_markdown,
    summary_lines,
    summary_table,
)
from solon.tables import clean, duration, estimate, money, number

HOSTILE = (
    "<script>alert(1)</script> | a | b |\n# heading\n\n```\ncode\n```\n![x](http://evil.example/p.png) "
    "[link](javascript:alert(1)) `tick` **bold** <img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} "
    "www.evil.example "
    "https://evil.example me@evil.example $x$ \x1b[31mred\x1b[0m \u202etxt --> </pre></div> &lt;b&gt; "
    "[bold]rich[/bold]"
)
MARKDOWN_TAGS = set(
    [
        "h1",
        "h2",
        "h3",
        "blockquote",
        "p",
        "strong",
        "ul",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "br",
    ]
)

# Where the report says that a part of the data is missing. Without warnings there is nothing to warn of; the
# models' names also stand in the measures.
PARTS = {
    "checks": "## Checks",
    "measures": "## Measures that nothing was trained on",
    "changes": "## Changes from model to model",
    "kl": "## KL of the policy that is written",
    "reward_model": "## Reward model",
    "ppo": "## PPO",
    "stages": "## Stages",
    "principles": "## Principles",
    "answers": "## Answers side by side",
}


def value(v, low, high, n):
    return {"value": v, "low": low, "high": high, "n": n}


@pytest.fixture
def data():
    """Invented: no run gave these numbers."""
    return {
        "name": "invented run",
        "recipe_name": "hybrid",
        "created": "2026-01-02T03:04:05+00:00",
        "model": "smollm2",
        "constitution": {
            "name": "example",
            "version": "1.0.0",
            "fingerprint": "0123456789abcdef",
            "principles": 16,
        },
        "models": ["start", "SL-CAI", "RL-CAI"],
        "measures": [
            {
                "name": "reward",
                "unit": "sd",
                "better": "higher",
                "trained_on": True,
                "values": {
                    "start": value(-0.123, -0.31, 0.09, 96),
                    "SL-CAI": value(0.4, 0.2, 0.6, 96),
                    "RL-CAI": value(1.255, 1.0, 1.5, 96),
                },
            },
            {
                "name": "refusals of red-team prompts",
                "unit": "%",
                "better": "",
                "trained_on": False,
                "values": {
                    "start": value(12.5, 8.1, 17.3, 48),
                    "SL-CAI": value(6, 2, 10.4, 48),
                    "RL-CAI": None,
                },
            },
            {
                "name": "distinct-3",
                "unit": "",
                "better": "higher",
                "trained_on": False,
                "values": {"start": value(0.7012, 0.68, 0.72, 96), "SL-CAI": value(0.65, None, None, 1)},
            },
            {
                "name": "length",
                "unit": "words",
                "better": "",
                "trained_on": False,
                "values": {
                    "start": value(51.27, 40.0, 60.0, 96),
                    "SL-CAI": value(None, None, None, 0),
                    "RL-CAI": value(66.0, 60.0, 72.5, 96),
                },
            },
        ],
        "checks": [
            {
                "name": "held-out reward rises",
                "target": "> 0 sd",
                **value(0.854, 0.5, 1.2, 96),
                "unit": "sd",
                "outcome": "holds",
                "holds": True,
                "do": None,
            },
            {
                "name": "KL to the reference",
                "target": "< 30 nats",
                **value(41.5, 33.0, 50.0, 40),
                "unit": "",
                "outcome": "does not hold",
                "holds": False,
                "do": "lower the learning rate",
            },
            {
                "name": "distinct-3 falls by",
                "target": "≤ 20 %",
                **value(None, None, None, 0),
                "unit": "%",
                "outcome": "cannot be told",
                "holds": None,
                "do": "hold out more prompts",
            },
        ],
        "headline": "From start to RL-CAI: it cannot be told.",
        "changes": [
            {
                "name": "reward",
                "unit": "sd",
                "better": "higher",
                "trained_on": True,
                "steps": {"start → SL-CAI": value(0.523, 0.3, 0.7, 96), "start → RL-CAI": value(-0.25, -0.5, 0.1, 96)},
            },
            {
                "name": "refusals of red-team prompts",
                "unit": "points",
                "better": "",
                "trained_on": False,
                "steps": {"start → SL-CAI": value(-6.5, -20, 7, 48)},
            },
        ],
        "kl": {
            "kl_nats": value(39.4, 30.0, 48.8, 96),
            "examples": 96,
            "not_finite": 0,
            "identical": False,
            "response_tokens": 51.0,
            "left_out": {},
            "temperature": 0.7,
            "max_tokens": 64,
        },
        "same_kl": [{"kl_nats": 1.0, "reward": 0.125, "update": 3}],
        "heldout": {
            "heldout_from": {"helpful": "10 of 50 in mine.jsonl, kept out of training"},
            "heldout_comparisons": 80,
            "removed": {"demonstrations": 3},
        },
        "machine": {"cpu": "Some CPU", "cores": 2, "gpus": ["Some GPU"], "memory_mb": 16384, "system": "Linux x86_64"},
        "seconds": 75.0,
        "seed": 17,
        "dtype": "bfloat16",
        "model_fingerprint": "fedcba9876543210",
        "versions": {"solon": "0.1.0", "torch": "2.13.0"},
        "reward_model": {
            "by_source": [{"source": "red_team", "accuracy": value(0.7125, 0.62, 0.80, 120), "n": 120}],
            "comparisons": 1800,
            "abstained": 42,
            "loss_first": 0.693,
            "loss_last": 0.412,
        },
        "ppo": [
            {
                "update": i,
                "reward": 0.02 * i,
                "kl_nats": 0.5 * i**0.5,
                "entropy_nats": 2 - 0.01 * i,
                "response_tokens": 60 + i % 7,
                "clip_fraction": 0.08,
                "kl_coefficient": None if i == 3 else 0.05,
            }
            for i in range(40)
        ],
        "stages": [
            {
                "name": "revisions",
                "records": 512,
                "seconds": 725.4,
                "prompt_tokens": 123456,
                "completion_tokens": 65432,
                "trained_tokens": 0,
                "cost_usd": 0.0,
            },
            {
                "name": "sl-cai",
                "records": 1024,
                "seconds": 31.25,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "trained_tokens": 98765,
                "cost_usd": None,
                "result": {"left_out": {"empty revision": 2, "too long": 1}},
            },
            {
                "name": "comparisons",
                "records": 9,
                "seconds": 1.0,
                "prompt_tokens": 5,
                "completion_tokens": 5,
                "trained_tokens": 0,
                "cost_usd": None,
                "endpoints": ["some-model"],
                "unpriced": ["some-model"],
            },
        ],
        "principles": [
            {"id": "harmless", "revisions": 130, "comparisons": 77, "mean_label": 0.5123},
            {"id": "honest", "revisions": 0, "comparisons": 0, "mean_label": None},
        ],
        "answers": [
            {
                "prompt": f"Question {i}?",
                "source": "red_team" if i < 3 else "helpful",
                "answers": {
                    "start": "I can't help.",
                    "SL-CAI": "A longer answer,\nin two lines, that explains itself " * 4,
                    "RL-CAI": "Short and useful.",
                },
            }
            for i in range(6)
        ],
        "warnings": ["This report is about a small model (135M)."],
    }


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def markdown_page(text: str) -> Page:
    """Markdown as a renderer that lets HTML through gives it to a browser: the worst case."""
    return Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


def poisoned(data):
    """The same report with hostile text wherever a text can stand."""
    bad = copy.deepcopy(data)
    bad["name"] = bad["recipe_name"] = bad["model"] = bad["created"] = HOSTILE
    bad["constitution"] |= {"name": HOSTILE, "fingerprint": HOSTILE}
    bad["models"] = ["start", HOSTILE]
    bad["warnings"] = [HOSTILE]
    for part, keys in (
        ("measures", ["name", "unit"]),
        ("checks", ["name", "target", "outcome", "do", "unit", "about"]),
        ("changes", ["name", "unit"]),
        ("stages", ["name"]),
        ("principles", ["id"]),
        ("answers", ["prompt", "source"]),
    ):
        for row in bad[part]:
            row.update(dict.fromkeys(keys, HOSTILE))
    for row in bad["measures"]:
        row["values"][HOSTILE] = value(1.0, 0.0, 2.0, 3)
    for row in bad["answers"]:
        row["answers"] = {"start": HOSTILE, HOSTILE: HOSTILE}
    for row in bad["changes"]:
        row["steps"][HOSTILE] = value(1.0, 0.0, 2.0, 3)
    bad["headline"] = bad["model_fingerprint"] = bad["dtype"] = bad["machine"]["cpu"] = HOSTILE
    bad["machine"]["gpus"] = [HOSTILE]
    bad["versions"] = {HOSTILE: HOSTILE}
    bad["heldout"] = {"heldout_from": {HOSTILE: HOSTILE}, "removed": {HOSTILE: 3}, "heldout_comparisons": 80}
    for row in bad["stages"]:
        row["endpoints"] = [HOSTILE]
    bad["stages"][1]["result"] = {"left_out": {HOSTILE: 3}}
    bad["stages"][2]["unpriced"] = [HOSTILE]
    bad["reward_model"]["by_source"][0]["source"] = HOSTILE
    return bad


def test_html_keeps_hostile_text_inert(data):
    clean_page, page = Page(render_html(data)), Page(render_html(poisoned(data)))
    assert {t for t, _ in page.tags} <= {t for t, _ in clean_page.tags}
    assert not {t for t, _ in page.tags} & {"script", "img", "a", "b", "link", "iframe", "form"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a in ("href", "src", "style")]
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text


def test_html_is_self_contained(data):
    html = render_html(data)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html
    assert not re.search(r"https?://|url\(|@import|<script", html)
    # the policy comes before anything it governs
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_markdown_keeps_hostile_text_inert(data):
    text = render_markdown(poisoned(data))
    calm, page = markdown_page(render_markdown(data)), markdown_page(text)
    assert {t for t, _ in page.tags} <= MARKDOWN_TAGS
    assert [t for t, _ in page.tags if t == "tr"] == [t for t, _ in calm.tags if t == "tr"]
    assert "<script>alert(1)</script>" in page.text and "`tick` **bold**" in page.text
    # bare addresses that GitHub would link, and formulas
    assert not re.search(r"://|www\.|\$|\w@\w", text)
    assert "\x1b" not in text and "\u202e" not in text


@settings(max_examples=150)
@given(st.text(st.sampled_from("a1 <>|`*_[]()#!~\\-+=&;$@:/.\n\"'{}") | st.characters(), max_size=60))
def test_escaped_markdown_shows_the_text_and_nothing_else(text):
    safe = escape_markdown(text)
    page = markdown_page(f"| x |\n| --- |\n| y{safe}z |\n\n- **m:** {safe}z")
    assert {t for t, _ in page.tags} <= MARKDOWN_TAGS
    assert [t for t, _ in page.tags].count("td") == 1

    def squeezed(s: str) -> str:
        return re.sub(r"\s+", "", s)

    assert squeezed(page.text) == squeezed(f"xy{clean(text)}zm:{clean(text)}z")


def test_numbers_appear_in_both(data):
    html, markdown = Page(render_html(data)).text, markdown_page(render_markdown(data)).text
    for page in (html, markdown):
        for shown in (
            "12.5 % [8.1, 17.3], n = 48",
            "6.0 % [2.0, 10.4], n = 48",
            "-0.12 sd [-0.31, 0.09], n = 96",
            "0.701 [0.680, 0.720], n = 96",
            "0.650 [no interval], n = 1",
            "51.3 words [40.0, 60.0], n = 96",
            "71.2 % [62.0, 80.0], n = 120",
            "+0.52 sd [0.30, 0.70], n = 96",
            "-6.5 points [-20.0, 7.0], n = 48",
            "39.40 nats per response [30.00, 48.80], n = 96",
            "17",
            "bfloat16",
            "fedcba9876543210",
            "Some CPU, 2 cores; Some GPU; 16.0 GiB of memory",
            "1 min 15 s",
            "torch 2.13.0",
            "helpful 10 of 50 in mine.jsonl, kept out of training",
            "3 demonstrations",
            "2 empty revision, 1 too long",
            "price of some-model not known",
            "cannot be told",
            "lower the learning rate",
            "From start to RL-CAI: it cannot be told.",
            "0123456789abcdef",
            "1,800",
            "0.85 sd [0.50, 1.20], n = 96",
            "> 0 sd",
            "12 min 5 s",
            "123,456",
            "$0.00",
            "0.512",
            "12 of 40 updates",
            "holds",
            "does not hold",
            "This report is about a small model (135M).",
            "start → SL-CAI",
        ):
            assert shown in page, shown
        for row in data["answers"]:
            assert row["prompt"] in page


def test_missing_parts_are_said(data):
    html, markdown = Page(render_html(data)).text, render_markdown(data)
    for page in (html, markdown):
        assert "not measured, n = 0" in page
    row = next(line for line in markdown.splitlines() if "refusals of red-team" in line)
    assert row.endswith("| not measured |")
    row = next(line for line in markdown.splitlines() if "distinct-3 falls by" in line)
    assert row.count("not measured") == 1 and "cannot be told" in row and "hold out more prompts" in row
    # a total with an unknown part is unknown
    assert next(line for line in markdown.splitlines() if "all stages" in line).endswith("| not measured |")


def test_every_part_can_be_missing(data):
    whole = render_markdown(data)
    titles = [line for line in whole.splitlines() if line.startswith("## ")]
    for key in data:
        for absent in ({k: v for k, v in data.items() if k != key}, data | {key: None}):
            markdown, html = render_markdown(absent), Page(render_html(absent)).text
            assert "not measured" in html
            if key in PARTS:
                assert f"{PARTS[key]}\n\nnot measured\n" in markdown, key
                assert f"{PARTS[key]}\n\nnot measured\n" not in whole, key
            if key in ("recipe_name", "created", "model", "constitution"):
                assert re.search(r"^- .*: not measured$", markdown, re.M), key
            summary_table(absent)
    bare = render_markdown({})
    # without any data, every part is named and said to be missing, and no digit stands in for a number
    kept = [t for t in titles if "Reward model training" not in t]
    assert [line for line in bare.splitlines() if line.startswith("## ")] == kept
    assert bare.count("\nnot measured\n") == len(kept)
    assert Page(render_html({})).text.count("not measured") >= len(kept)


def test_numbers_that_are_none():
    assert number(None) == duration(None) == money(None) == estimate(None) == estimate({}) == "not measured"
    assert number(math.nan) == "not a number" and number(math.inf) == "infinite"
    assert number(0) == "0" and number(0.0) == "0" and number(12345) == "12,345"
    assert money(0.00123) == "$0.0012" and money(1234.5) == "$1,234.50"
    assert duration(3725) == "1 h 02 min"
    assert estimate(value(0.0, 0.0, 0.0, 48), "%") == "0.0 % [0.0, 0.0], n = 48"
    assert estimate({"value": 3.0}, "%") == "3.0 % [no interval], n = not measured"


def test_curves_break_where_a_value_is_missing(data):
    html = render_html(data)
    lines = [attrs["points"] for tag, attrs in Page(html).tags if tag == "polyline"]
    assert len(lines) == 7  # six curves, of which the KL coefficient's has a gap
    assert sorted(len(points.split()) for points in lines) == [3, 36, 40, 40, 40, 40, 40]
    data["ppo"] = [u | {"kl_nats": math.nan} for u in data["ppo"]]
    assert "not a number" in render_html(data)


def test_summary_table(data):
    out = io.StringIO()
    Console(file=out, width=200).print(summary_table(data))
    text = out.getvalue()
    for shown in ("12.5 % [8.1, 17.3], n = 48", "reward *", "RL-CAI", "not measured", "[95 % interval]"):
        assert shown in text
    assert text.index("length") < text.index("reward *")
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True).print(summary_table(poisoned(data)))
    assert "\x1b[31mred" not in out.getvalue() and "[bold]rich[/bold]" in out.getvalue().replace("\n", "")


def test_report_reads_its_own_json(data):
    again = json.loads(json.dumps(data))
    assert render_markdown(again) == render_markdown(data) and render_html(again) == render_html(data)
    if where := os.environ.get("SOLON_SAMPLE_REPORT"):  # for looking at it
        Path(where).write_text(render_html(again), encoding="utf-8")
        Path(where).with_suffix(".md").write_text(render_markdown(again), encoding="utf-8")


def results_page():
    path = Path(__file__).parents[1] / "benchmarks" / "results_page.py"
    spec = importlib.util.spec_from_file_location("results_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_has_the_runs_figures_and_nothing_else_changes_on_it(data, tmp_path):
    page = results_page()
    shipped = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    made = page.filled(shipped, data)

    def without(text):
        return re.sub(r"(<!-- figures: .*? -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)

    assert without(made) == without(shipped) and page.filled(made, data) == made
    for shown in ("0.85 sd [0.50, 1.20], n = 96", "39.40 nats per response", "12 of 40 updates", "Some CPU, 2 cores"):
        assert (shown in made) is (shown != "12 of 40 updates"), shown  # the page shows no single updates
    assert "From start to RL-CAI: it cannot be told." in made and made.count("<!-- end -->") == shipped.count(
        "<!-- end -->"
    )
    assert page.filled("<!-- figures: updates -->\n<!-- end -->", data).count("\n| ") > 10
    for wrong, says in (
        ("<!-- figures: nothing -->\n<!-- end -->", "asks for figures"),
        ("<!-- figures: kl -->\n", "no <!-- end -->"),
    ):
        with pytest.raises(InputError, match=says):
            page.filled(wrong, data)
    two = "<!-- figures: kl -->\nlost\n<!-- figures: checks -->\n<!-- end -->\n"
    with pytest.raises(InputError, match='"kl" has no <!-- end -->'):
        page.filled(two, data)


def test_the_page_of_results_keeps_hostile_text_inert(data):
    page = results_page()
    block = "\n\n".join(f"<!-- figures: {name} -->\n<!-- end -->" for name in page.blocks(data))
    shown = markdown_page(page.filled(block, poisoned(data)))
    assert {t for t, _ in shown.tags} <= MARKDOWN_TAGS and "\x1b" not in shown.text


def test_the_terminal_says_outcomes_what_to_do_and_what_was_left_out(data):
    out = io.StringIO()
    Console(file=out, width=160).print(checks_table(data))
    for outcome in ("holds", "does not hold", "cannot be told"):
        assert outcome in out.getvalue()
    lines = summary_lines(data)
    assert lines[0] == data["headline"]
    assert "KL to the reference: does not hold; lower the learning rate" in lines
    assert "sl-cai: left out 3 of 1,027 (2 empty revision, 1 too long)" in lines
    assert not any("held-out reward rises" in line for line in lines)  # it holds: nothing to do
    assert "\x1b" not in "".join(summary_lines(poisoned(data)))
