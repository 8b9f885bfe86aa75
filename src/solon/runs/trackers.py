"""Training curves for TensorBoard, always, and for whatever other trackers the user names.

They are accelerate's own (`report_to` as in transformers and TRL): tensorboard, wandb, trackio, mlflow, comet_ml, aim,
clearml, dvclive, swanlab, with the settings that each reads from its environment.
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
    """The trackers that accelerate knows, by name. Raises InputError for a name that is none of them."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(getattr(k, "value", k)): found for k, found in LOGGER_TYPE_TO_CLASS.items()}
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
    """Something to log with. TensorBoard's files go to directory/name."""
    known = check_trackers(report_to)
    open_: list[Any] = []
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
            if kind != "tensorboard":  # its own form of this writes a second event file for every start
                tracker.store_init_configuration(dict(config or {}))
            open_.append(tracker)

        def log(values: Mapping[str, float], step: int) -> None:
            for tracker in open_:
                tracker.log(dict(values), step=step)

        yield log
    finally:
        for tracker in open_:
            tracker.finish()


@contextmanager
def tracked(
    step: Progress, directory: Path, name: str, report_to: Sequence[str] = (), config: Mapping[str, Any] | None = None
) -> Iterator[Progress]:
    """A trainer's progress callback that also logs what it shows, from its beginning: curves of an earlier start go."""
    if distributed.is_main():
        for old in (directory / name).glob("events.out.tfevents.*"):
            old.unlink()
    with trackers(directory, name, report_to, config) as log:

        def both(at: int, of: int, shown: dict[str, float]) -> None:
            log(shown, at)
            step(at, of, shown)

        yield both
