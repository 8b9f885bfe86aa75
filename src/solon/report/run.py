"""A whole run: its stages, then its report. `write_report` gathers the report's data from the run directory."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from solon.models.weights import model_fingerprint, resolve
from solon.publishing import write_whole
from solon.recipes.pipeline import resolved, run_stages
from solon.recipes.recipe import Recipe
from solon.report.headline import headline
from solon.report.render import render_html, render_markdown
from solon.runs.ledger import left_out_line
from solon.runs.run import Run
from solon.stages import in_order
from solon.stages.artifacts import DATA, START_MODEL

SMALL = 1e9  # weights


def run_recipe(recipe: Recipe, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the recipe's stages in `out`, or the stages that are left, and write the report. Returns the report's data."""
    began = time.monotonic()
    with Run(resolved(recipe, out), out, quiet=quiet) as run:
        run_stages(run, recipe.dtype)
        return write_report(run, time.monotonic() - began)


def write_report(run: Run, seconds: float) -> dict[str, Any]:
    """Gather the data of a finished run, write it to report.json, .md and .html, and return it.

    seconds: wall time since this start of the run.
    """
    stages, ledger = in_order(run.recipe), stages_with_abstentions(run)
    constitution = run.constitution
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
        "constitution": {
            "name": constitution.name,
            "version": constitution.version,
            "fingerprint": constitution.fingerprint,
            "principles": len(constitution.principles),
        },
        "machine": _machine(),
        "seconds": round(seconds, 1),
        "versions": _versions(ledger),
        "heldout": run.get(DATA).split(),
        "stages": ledger,
        "left_out": [line for s in ledger if (line := left_out_line(s))],
        "warnings": [*_warnings(run), *(line for stage in stages for line in stage.warnings(run))],
    }
    for stage in stages:
        for key, value in stage.gather(run).items():  # several stages may add to one part, such as `trust`
            known = data.get(key)
            data[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    data["headline"] = headline(data)
    data["checks"] = [check for stage in stages for check in stage.checks(run, data)]
    write_whole(run.dir / "report.json", json.dumps(data, ensure_ascii=False, indent=1))
    write_whole(run.dir / "report.md", render_markdown(data))
    write_whole(run.dir / "report.html", render_html(data))
    return data


def stages_with_abstentions(run: Run) -> list[dict[str, Any]]:
    """The ledger's stages, each with the abstentions among its comparisons, by reason."""
    stages = []
    for stage in run.ledger:
        reasons: Counter[str] = Counter()
        for r in run.journalled(stage["name"]):
            if r.get("abstained") is True:
                why = next((j["abstained"] for j in r.get("judgements", ()) if j.get("abstained")), "")
                reasons[f"abstained: {why}" if why else "abstained"] += 1
        # stage.json lists each failed item by its id; the report needs only the counts of the reasons.
        stages.append({**{k: v for k, v in stage.items() if k not in ("failed", "again")}, "abstained": dict(reasons)})
    return stages


def _versions(stages: list[dict[str, Any]]) -> dict[str, str]:
    """The package versions of the stages; several of one package where a run continued with another version."""
    versions: dict[str, list[str]] = {}
    for stage in stages:
        for name, version in (stage.get("versions") or {}).items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    return {name: ", then ".join(each) for name, each in versions.items()}


def _warnings(run: Run) -> list[str]:
    """Notes on the whole run that a reader needs before the numbers."""
    from transformers import AutoConfig

    notes = []
    config = AutoConfig.from_pretrained(resolve(run.get(START_MODEL))).get_text_config()
    if 12 * config.num_hidden_layers * config.hidden_size**2 + config.vocab_size * config.hidden_size < SMALL:
        notes.append(
            "The model of this run is small (under a billion weights). A small model may lose sense in training: read the "
            "answers below before you trust a measure. The run shows that the method works, not how a large model would do."
        )
    if run.recipe.model == "smollm2":
        notes.append(
            "smollm2 here is SmolLM2-135M-Instruct from 4-bit weights, dequantised: not the published weights."
        )
    if any(name.startswith("solon:") for name in run.recipe.human.comparisons):
        notes.append(
            "The human comparisons and demonstrations are those that ship with Solon. Solon's developers wrote them; use "
            "your own human data for results that you rely on."
        )
    return notes


def _machine() -> dict[str, Any]:
    """The machine of this process. memory_mb: the machine's memory; None where the system does not report it."""
    try:
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, ValueError, OSError):  # Windows
        memory_mb = None
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "memory_mb": memory_mb,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
