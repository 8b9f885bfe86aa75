"""Write the tables of docs/results.md from a run's report.json, so that no figure on it is typed by hand.

    python -m benchmarks.results_page RUN [--page docs/results.md]

The page holds blocks, `<!-- figures: NAME -->` to `<!-- end -->`. What stands between the two lines is replaced by the run's
own; the text around them is left as it is. Each block has the cells of the run's report. A name that no run has is an
error, and so is a block without its end.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from solon.errors import InputError
from solon.report.render import escape_markdown, section_markdown
from solon.report.sections import facts, sections
from solon.tables import Section

_BLOCK = re.compile(r"(<!-- figures: (?P<name>[a-z-]+) -->\n)(?P<old>.*?)(<!-- end -->)", re.DOTALL)
# Blocks that are a section of the report, by the beginning of its title.
TITLES = {
    "checks": "Checks",
    "measures-not-trained-on": "Measures that nothing was trained on",
    "measures-trained-on": "Measures that training pushed on",
    "changes": "Changes from model to model",
    "reward-model": "Reward model",
    "judge": "Can the judge be trusted?",
    "updates": ("PPO", "RLOO", "GRPO", "DPO"),
    "checks-while-training": "Checks while training",
    "same-kl": "Reward at the same KL",
    "kl": "KL of the policy that is written",
    "stages": "Stages",
    "left-out": "Left out",
}


def blocks(data: dict[str, Any]) -> dict[str, str]:
    """Every block that a run's report.json can fill, as Markdown. A section that the run did not have says so."""
    found: dict[str, Section] = {}
    for section in sections(data):
        found.setdefault(section.title, section)
    made = {
        "headline": f"**{escape_markdown(str(data.get('headline') or 'not measured'))}**\n",
        "facts": "".join(f"- {escape_markdown(label)}: {escape_markdown(value)}\n" for label, value in facts(data)),
    }
    for name, titles in TITLES.items():
        given = next((found[t] for t in ([titles] if isinstance(titles, str) else titles) if t in found), None)
        made[name] = "\n".join(section_markdown(given)) if given else "not measured in this run\n"
    return made


def filled(page: str, data: dict[str, Any]) -> str:
    """The page with each of its blocks filled by the run. Raises InputError for a block that cannot be filled."""
    made = blocks(data)
    named = re.findall(r"<!-- figures: (.*?) -->", page)
    for name in named:
        if name not in made:
            raise InputError(f'the page asks for figures "{name}"; a run has {", ".join(made)}')
    whole = [m["name"] for m in _BLOCK.finditer(page) if "<!-- figures:" not in m["old"]]
    if whole != named:
        raise InputError(f'the block of figures "{next(n for n in named if n not in whole)}" has no <!-- end -->')
    return _BLOCK.sub(lambda m: f"{m[1]}{made[m['name']].rstrip()}\n{m[4]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of docs/results.md from a run.")
    parser.add_argument("run", type=Path, help="the directory of a finished run")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "results.md")
    given = parser.parse_args()
    data = json.loads((given.run / "report.json").read_text(encoding="utf-8"))
    given.page.write_text(filled(given.page.read_text(encoding="utf-8"), data), encoding="utf-8")
    print(given.page)


if __name__ == "__main__":
    main()
