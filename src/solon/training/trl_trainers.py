"""TRL's trainers as Solon runs them: one GPU per process, no printed lines, and a stop at a gradient that is not finite."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from solon.training.finite import LastGood


def trainer_config(kind: Any, out: Path, seed: int, **settings: Any) -> Any:
    """A configuration of TRL: `kind` is its class, such as SFTConfig; the arguments that never vary are set here.

    out: the model directory. The trainer's scratch folder, `.NAME.trainer`, lies beside it.
    """
    config = kind(
        output_dir=str(out.parent / f".{out.name}.trainer"),
        seed=seed,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    # transformers puts a DataParallel model on every GPU that a process sees; in Solon one process uses one GPU.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def run_trainer(trainer: Any) -> str | None:
    """Train, and leave finite weights in the model. Returns why the training ended early; None where it did not.

    The scratch folder is removed where it is empty, also after an error. Raises Diverged where the first gradient is not
    finite.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    good = LastGood(trainer.model.parameters())

    class StopAtBadGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not good.check(0.0):  # a loss that is not finite has no finite gradient
                for p in good.parameters:
                    p.grad = None  # the optimiser then changes nothing
                control.should_training_stop = True

    trainer.add_callback(StopAtBadGradient())
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, (PrinterCallback, ProgressCallback)):  # Solon shows the progress
            trainer.remove_callback(callback)
    try:
        trainer.train()
        good.finish()
    finally:
        with suppress(OSError):
            Path(trainer.args.output_dir).rmdir()
    return good.stopped
