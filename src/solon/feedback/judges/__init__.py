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
    name = engine.name.removeprefix("judge:")
    kinds = discover("solon.feedback.judges", GROUP, lambda x: isinstance(x, type) and issubclass(x, Judge))
    known = {kind.name: kind for kind in kinds}
    if name not in known:
        raise InputError(f'no judge is called "{name}"; there are {", ".join(known)}{nearest(name, list(known))}')
    judge: Judge = known[name]()
    judge.constitution, judge.settings = asked_constitution(constitution, settings), settings
    judge.engine, judge.seed, judge.meta = engine, seed, meta
    return judge
