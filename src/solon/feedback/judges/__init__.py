"""Judges that are no model, by name: `judge:longer` as `--model` or as a recipe's `feedback.judge`.

Each is a subclass of `Judge` in a file of its name in this folder, or behind an entry point `solon.judges` of another
package. A model as a judge is `ModelJudge`; both are opened here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from solon.constitution import Constitution
from solon.engines import Engine, scheme_of
from solon.errors import InputError, nearest
from solon.feedback.judge import Judge, ModelJudge, asked_constitution
from solon.feedback.settings import JudgeSettings
from solon.plugins import discover
from solon.records import Comparison

GROUP = "solon.judges"


def open_judge(
    engine: Engine,
    constitution: Constitution,
    settings: JudgeSettings,
    human: Sequence[Comparison] = (),
    *,
    seed: int = 0,
    meta: Callable[[], dict[str, Any]] = dict,
) -> Judge:
    """The judge of an engine's name: a model that is asked, or the judge that `judge:NAME` names.

    human: labelled comparisons, of which `settings.few_shot` are shown as examples.
    """
    if scheme_of(engine.name) != "judge":
        return ModelJudge.of_settings(engine, constitution, settings, human, seed=seed, meta=meta)
    judge = judge_kind(engine.name)()
    judge.constitution, judge.settings = asked_constitution(constitution, settings), settings
    judge.engine, judge.seed, judge.meta = engine, seed, meta
    return judge


def judge_kind(spec: str) -> type[Judge]:
    """The class that `judge:NAME` names. Raises InputError where there is none."""
    name = spec.removeprefix("judge:")
    kinds = discover("solon.feedback.judges", GROUP, lambda x: isinstance(x, type) and issubclass(x, Judge), "judge")
    known: dict[str, type[Judge]] = {kind.name: kind for kind in kinds}
    if name not in known:
        raise InputError(f'no judge is called "{name}"; there are {", ".join(known)}{nearest(name, list(known))}')
    return known[name]


def check_rates(spec: str) -> None:
    """Raises InputError where the judge of that name rates no single response. A model is asked; it may abstain."""
    if scheme_of(spec) == "judge" and judge_kind(spec).rate is Judge.rate:
        raise InputError(f"{spec}: this judge compares responses and does not rate a single one; name a model")
