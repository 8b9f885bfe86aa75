"""TRL's trainers as Solon runs them: they stop where a number is not finite, and print nothing."""

from __future__ import annotations

from typing import Any

from solon.training.finite import LastGood


def watching(trainer: Any) -> LastGood:
    """Has a transformers trainer (TRL's are) stop where its gradient is not finite. Call `finish` after its training."""
    from transformers import TrainerCallback

    good = LastGood(trainer.model.parameters())

    class Finite(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not good.check(0.0):  # a loss that is not finite has no finite gradient
                for p in good.parameters:
                    p.grad = None  # nothing to step along
                control.should_training_stop = True

    trainer.add_callback(Finite())
    return good


def without_printers(trainer: Any) -> Any:
    """The trainer without its own console printers: progress is Solon's to show."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, (PrinterCallback, ProgressCallback)):
            trainer.remove_callback(callback)
    return trainer
