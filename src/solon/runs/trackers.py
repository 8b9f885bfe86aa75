"""Training curves: always for TensorBoard, and for the other trackers that the user names.

The trackers are those of accelerate (`report_to` as in transformers and TRL): tensorboard, wandb, trackio, mlflow, comet_ml, aim,
clearml, dvclive and swanlab. Each tracker reads its settings from the environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from solon import distributed
from solon.errors import InputError, nearest
from solon.training.settings import Log, Progress


def check_trackers(names: Sequence[str]) -> dict[str, Any]:
    """The classes of accelerate's trackers, by name. Raises InputError for a name that accelerate does not know."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(getattr(name, "value", name)): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    for name in names:
        if name not in known:
            raise InputError(
                f'report_to: no tracker "{name}"; there are {", ".join(known)}{nearest(name, list(known))}'
            )
    return known


@contextmanager
def trackers(
    directory: Path, name: str, report_to: Sequence[str] = (), config: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """Yields a function that logs values by name at a step. TensorBoard's files go to directory/name."""
    known = check_trackers(report_to)
    started: list[Any] = []
    if not distributed.is_main():
        yield lambda values, step: None
        return
    try:
        for kind in dict.fromkeys(["tensorboard", *report_to]):
            needs = {"logging_dir": str(directory)} if known[kind].requires_logging_directory else {}
            try:
                tracker = known[kind](name, **needs)
                tracker.start()
            except ImportError as error:
                raise InputError(f"report_to: {kind} is not installed ({error}); pip install {kind}") from error
            if kind != "tensorboard":  # TensorBoard would write a second event file at every start
                tracker.store_init_configuration(dict(config or {}))
            started.append(tracker)

        def log(values: Mapping[str, float], step: int) -> None:
            for tracker in started:
                tracker.log(dict(values), step=step)

        yield log
    finally:
        for tracker in started:
            tracker.finish()


@contextmanager
def tracked(
    step: Progress, directory: Path, name: str, report_to: Sequence[str] = (), config: Mapping[str, Any] | None = None
) -> Iterator[Progress]:
    """Yields a progress callback that also logs the values it shows. The curves of an earlier start are deleted."""
    if distributed.is_main():
        for old in (directory / name).glob("events.out.tfevents.*"):
            old.unlink()
    with trackers(directory, name, report_to, config) as log:

        def logged_step(done: int, total: int, shown: dict[str, float]) -> None:
            log(shown, done)
            step(done, total, shown)

        yield logged_step
