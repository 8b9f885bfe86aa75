"""The measures of several runs of one recipe that differ in their seed or dtype: each run, and all runs together.

    python -m benchmarks.seeds RUN RUN [RUN ...]

Prompts and runs are two random factors that cross: another choice of prompts and another training would both change a mean. Its
variance is that of a crossed design, (MS_runs + MS_prompts - MS_rest) / (runs x prompts), from the mean squares of a two-way analysis
of variance; its interval is Student's t with Satterthwaite's degrees of freedom. With three runs such intervals are wide, as they should be.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from solon.analysis.measures import Answer, Measure, all_measures
from solon.errors import InputError
from solon.measures.statistics import CONFIDENCE, Estimate, Floats
from solon.tables import estimate, number

STEPS = (("start", "sl-cai"), ("sl-cai", "rl-cai"), ("start", "rl-cai"))
NAMES = {"start": "start", "sl-cai": "SL-CAI", "rl-cai": "RL-CAI"}


def crossed_mean(values: Floats) -> Estimate:
    """The mean over runs and prompts with its interval over both. values: (runs, prompts), with two runs and two prompts at least."""
    runs, prompts = values.shape
    mean = float(values.mean())
    of_runs, of_prompts = values.mean(1), values.mean(0)
    rest = values - of_runs[:, None] - of_prompts[None, :] + mean
    squares = np.array([
        prompts * of_runs.var(ddof=1),
        runs * of_prompts.var(ddof=1),
        (rest**2).sum() / ((runs - 1) * (prompts - 1)),
    ])  # fmt: skip
    freedom = np.array([runs - 1, prompts - 1, (runs - 1) * (prompts - 1)])
    total = max(squares[0] + squares[1] - squares[2], *squares[:2])  # an estimate by differences may come out too small
    if total == 0:  # all values are the same
        return Estimate(mean, None, None, values.size, runs)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, total**2 / (squares**2 / freedom).sum()) * math.sqrt(total / values.size)
    return Estimate(mean, mean - half, mean + half, values.size, runs)


def read(run: Path, model: str) -> list[Answer]:
    path = run / f"evaluation-{model}" / "records.jsonl"
    return [Answer.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def matrix(measure: Measure, runs: list[list[Answer]]) -> Floats:
    """The measure's values, (runs, prompts). Raises InputError where the runs have measured other prompts."""
    by_prompt = [measure.by_prompt(answers) for answers in runs]
    if any(values.keys() != by_prompt[0].keys() for values in by_prompt):
        raise InputError(f"{measure.name}: the runs have other prompts; give runs of one recipe")
    scale = 100.0 if measure.is_share else 1.0
    return scale * np.array([[values[i] for i in by_prompt[0]] for values in by_prompt])


def table(runs: list[Path]) -> str:
    answers = {model: [read(run, model) for run in runs] for model in NAMES}
    lines = [
        f"| measure | model | {' | '.join(run.name for run in runs)} | all [95 %] |",
        "|---" * (len(runs) + 3) + "|",
    ]
    for measure in all_measures():
        values = {model: matrix(measure, of_model) for model, of_model in answers.items()}
        shown = [(NAMES[model], values[model]) for model in NAMES]
        shown += [(f"{NAMES[a]} → {NAMES[b]}", values[b] - values[a]) for a, b in STEPS]
        for name, part in shown:
            together = crossed_mean(part)
            each = " | ".join(number(float(x)) for x in part.mean(1))
            lines.append(f"| {measure.name} ({measure.unit}) | {name} | {each} | {estimate(together.to_json())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print(table([Path(p) for p in sys.argv[1:]]))
