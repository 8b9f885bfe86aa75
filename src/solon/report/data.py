"""What a finished run has to say, gathered from its directory: the report's data and its warnings."""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from solon.measures.statistics import share
from solon.models.weights import model_fingerprint, resolve
from solon.publishing import write_whole
from solon.report.checks import checks
from solon.report.headline import headline
from solon.report.machine import machine
from solon.report.render import render_html, render_markdown
from solon.runs.evaluation import REWARD, Answer
from solon.runs.journal import read_journal
from solon.runs.ledger import left_out_line
from solon.runs.run import Run

KL_LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # nats a response, at which two runs can be compared


def write_report(
    run: Run,
    models: dict[str, str],
    evaluation: dict[str, Any],
    trust: dict[str, Any],
    kl: dict[str, Any],
    split: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Gather, write report.json, report.md and report.html into the run directory, and return the data.

    kl: of the policy that was written. split: what was held out, and what was taken out of training for it. seconds: of wall
    time since this start of the run.
    """
    updates = _journal(run, run.recipe.algorithm)
    stages = told_stages(run)
    data: dict[str, Any] = {
        "name": run.dir.name,
        "headline": "",
        "recipe_name": run.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": run.recipe.model,
        "model_fingerprint": model_fingerprint(models["start"]),
        "dtype": run.recipe.dtype,
        "seed": run.recipe.seed,
        "judge_model": None if run.recipe.feedback.labels == "human" else run.recipe.feedback.judge,
        "constitution": about_constitution(run),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "versions": versions_of(stages),
        "heldout": split,
        "models": list(models),
        "measures": evaluation["measures"],
        "changes": evaluation["changes"],
        "differences": next(c["steps"] for c in evaluation["changes"] if c["name"] == REWARD),
        "kl": {k: v for k, v in kl.items() if k != "by_prompt"},
        "reward_model": reward_model(run),
        "trust": trust,
        "ppo": updates,
        "same_kl": at_same_kl(updates),
        "algorithm": run.recipe.algorithm,
        "stages": stages,
        "left_out": [line for s in stages if (line := left_out_line(s))],
        "principles": principles(run),
        "answers": side_by_side(evaluation["answers"]),
        "warnings": warnings(run, models),
    }
    data["headline"] = headline(data)
    data["checks"] = checks(data, run.recipe.ppo.kl_bound)
    write_whole(run.dir / "report.json", json.dumps(data, ensure_ascii=False, indent=1))
    write_whole(run.dir / "report.md", render_markdown(data))
    write_whole(run.dir / "report.html", render_html(data))
    return data


def about_constitution(run: Run) -> dict[str, Any]:
    rules = run.constitution
    return {
        "name": rules.name, "version": rules.version, "fingerprint": rules.fingerprint,
        "principles": len(rules.principles),
    }  # fmt: skip


def reward_model(run: Run) -> dict[str, Any]:
    """How well the reward model does on comparisons that were kept away from it."""
    if run.recipe.feedback.direct:
        return {"by_source": [], "none": "none was trained: the judge's rating is the reward (feedback.direct)"}
    trained = run.state("reward-model").get("result", {})
    return {
        "by_source": [
            {
                "source": source,
                "accuracy": share(found["correct"]).to_json(),
                **{k: found.get(k) for k in ("n", "longer_is_better", "length_correlation", "calibration")},
            }
            for source, found in trained.get("heldout", {}).items()
        ],
        **{k: trained.get(k) for k in ("comparisons", "abstained", "loss_first", "loss_last")},
    }


def told_stages(run: Run) -> list[dict[str, Any]]:
    """The ledger, with the abstentions among each stage's comparisons, by reason."""
    told = []
    for stage in run.ledger:
        reasons: Counter[str] = Counter()
        for r in _journal(run, stage["name"]):
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


def at_same_kl(updates: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The rollouts' mean reward where training first reached so many nats, between two updates by a straight line.

    A policy gains reward by moving away from its reference, so two runs are compared at the same KL, not only at their ends.
    """
    curve = [
        (float(u["kl_nats"]), float(u["reward"]), u["update"])
        for u in updates
        if all(isinstance(u.get(k), (int, float)) and math.isfinite(u[k]) for k in ("kl_nats", "reward"))
    ]
    found = []
    for level in KL_LEVELS:
        for (kl0, r0, _), (kl1, r1, update) in pairwise(curve):
            if kl0 < level <= kl1:
                found.append(
                    {"kl_nats": level, "reward": r0 + (r1 - r0) * (level - kl0) / (kl1 - kl0), "update": update}
                )
                break
    return found


def principles(run: Run) -> list[dict[str, Any]]:
    """How often each principle was used, and P(the first of the two responses is better) by it, on average.

    A comparison speaks of the response that its label favours, so that mean would always be above one half; here each
    judgement is turned back to the order in which the pair was sampled.
    """
    revised = Counter(s["principle"] for r in _journal(run, "revisions") for s in r["steps"])
    first = {r["id"]: r["responses"][0] for r in _journal(run, "pairs")}
    found: dict[str, list[float]] = {}
    for r in _journal(run, "comparisons"):
        turned = r["chosen"][-1]["content"] != first.get(r["id"])
        for j in r["judgements"]:
            if j.get("forward") is not None and j.get("swapped") is not None:
                p = (j["forward"] + j["swapped"]) / 2
                found.setdefault(j["principle"], []).append(1 - p if turned else p)
    ids = [p.id for p in run.constitution.principles]
    return [
        {
            "id": i,
            "revisions": revised[i],
            "comparisons": len(found.get(i, [])),
            "mean_label": sum(found[i]) / len(found[i]) if i in found else None,
        }
        for i in [*ids, *sorted(set(found) - set(ids))]
    ]


def side_by_side(answers: dict[str, list[Answer]], n: int = 6) -> list[dict[str, Any]]:
    """n prompts, half of each kind, spread over the held-out set, with every model's answer."""
    rows = []
    first = next(iter(answers.values()))
    for source in ("red_team", "helpful"):
        given = [a for a in first if a.source == source]
        for k in range(min(n // 2, len(given))):
            asked = given[k * len(given) // (n // 2)]
            said = {name: next((a.answer for a in all_ if a.id == asked.id), None) for name, all_ in answers.items()}
            text = "\n".join(f"{m.role}: {m.content}" for m in asked.prompt) if len(asked.prompt) > 1 else None
            rows.append({"prompt": text or asked.prompt[-1].content, "source": source, "answers": said})
    return rows


def warnings(run: Run, models: dict[str, str]) -> list[str]:
    """What a reader must know before believing a number."""
    from transformers import AutoConfig

    found = []
    config = AutoConfig.from_pretrained(resolve(models["start"])).get_text_config()
    size = 12 * config.num_hidden_layers * config.hidden_size**2 + config.vocab_size * config.hidden_size
    if size < 1e9:
        found.append(
            "This run is about a small model (under a billion parameters). It shows that the method works, "
            "not what a large model would do."
        )
    reinforced = run.state(run.recipe.algorithm).get("result", {})
    if reinforced.get("gamed"):
        found.append(
            "The reward was being gamed: it rose while the judge's preference fell. What was written is the policy after "
            f"{reinforced['written_after']} updates."
        )
    if run.recipe.model == "smollm2":
        found.append(
            "smollm2 here is SmolLM2-135M-Instruct from 4-bit weights, dequantised: not the published weights."
        )
    if run.recipe.feedback.judge == "self" and run.recipe.feedback.labels != "human":
        found.append(
            "The judge is the model's own kin: reward and judge columns are measured by what trained the model, "
            "so read them beside the measures that nothing was trained on."
        )
    if any(name.startswith("solon:") for name in run.recipe.human.comparisons):
        found.append(
            "The human comparisons and demonstrations are the ones shipped with Solon: written by its developers, "
            "they stand where a user's human data goes."
        )
    return found


def _journal(run: Run, stage: str) -> list[dict[str, Any]]:
    return [record for _, record in read_journal(run.path(stage))]
