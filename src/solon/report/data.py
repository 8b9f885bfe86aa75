"""What a finished run has to say, gathered from its directory: the report's data and its warnings."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from solon.models.weights import model_fingerprint, resolve
from solon.publishing import write_whole
from solon.report.headline import headline
from solon.report.machine import machine
from solon.report.render import render_html, render_markdown
from solon.runs.ledger import left_out_line
from solon.runs.run import Run
from solon.stages import in_order
from solon.stages.artifacts import DATA, START_MODEL


def write_report(run: Run, seconds: float) -> dict[str, Any]:
    """Gather what the stages of a finished run have to say, write it to report.json, .md and .html, and return it.

    seconds: of wall time since this start of the run.
    """
    stages, ledger = in_order(run.recipe), told_stages(run)
    data: dict[str, Any] = {
        "name": run.dir.name,
        "headline": "",
        "recipe_name": run.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": run.recipe.model,
        "model_fingerprint": model_fingerprint(run.get(START_MODEL)),
        "dtype": run.recipe.dtype,
        "seed": run.recipe.seed,
        "judge_model": None,
        "constitution": about_constitution(run),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "versions": versions_of(ledger),
        "heldout": run.get(DATA).split(),
        "stages": ledger,
        "left_out": [line for s in ledger if (line := left_out_line(s))],
        "warnings": [*warnings(run), *(line for stage in stages for line in stage.warnings(run))],
    }
    for stage in stages:
        _merge(data, stage.gather(run))
    data["headline"] = headline(data)
    data["checks"] = [check for stage in stages for check in stage.checks(run, data)]
    write_whole(run.dir / "report.json", json.dumps(data, ensure_ascii=False, indent=1))
    write_whole(run.dir / "report.md", render_markdown(data))
    write_whole(run.dir / "report.html", render_html(data))
    return data


def _merge(data: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what a stage gathered. Several stages may add to one part, such as `trust`."""
    for key, value in more.items():
        known = data.get(key)
        data[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value


def about_constitution(run: Run) -> dict[str, Any]:
    rules = run.constitution
    return {
        "name": rules.name, "version": rules.version, "fingerprint": rules.fingerprint,
        "principles": len(rules.principles),
    }  # fmt: skip


def told_stages(run: Run) -> list[dict[str, Any]]:
    """The ledger, with the abstentions among each stage's comparisons, by reason."""
    told = []
    for stage in run.ledger:
        reasons: Counter[str] = Counter()
        for r in run.journalled(stage["name"]):
            if r.get("abstained") is True:
                why = next((j["abstained"] for j in r.get("judgements", ()) if j.get("abstained")), "")
                reasons[f"abstained: {why}" if why else "abstained"] += 1
        # Each failed item by its id stands in stage.json; here the reasons' counts are enough.
        told.append({**{k: v for k, v in stage.items() if k not in ("failed", "again")}, "abstained": dict(reasons)})
    return told


def versions_of(stages: list[dict[str, Any]]) -> dict[str, str]:
    """The versions that the stages ran with; several of one package where a run went on with another."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for name, version in (stage.get("versions") or {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", then ".join(each) for name, each in found.items()}


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing a number, of the run as a whole."""
    from transformers import AutoConfig

    found = []
    config = AutoConfig.from_pretrained(resolve(run.get(START_MODEL))).get_text_config()
    size = 12 * config.num_hidden_layers * config.hidden_size**2 + config.vocab_size * config.hidden_size
    if size < 1e9:
        found.append(
            "This run is about a small model (under a billion parameters). It shows that the method works, "
            "not what a large model would do."
        )
    if run.recipe.model == "smollm2":
        found.append(
            "smollm2 here is SmolLM2-135M-Instruct from 4-bit weights, dequantised: not the published weights."
        )
    if any(name.startswith("solon:") for name in run.recipe.human.comparisons):
        found.append(
            "The human comparisons and demonstrations are the ones shipped with Solon: written by its developers, "
            "they stand where a user's human data goes."
        )
    return found
