"""Validation loss and bits per byte, between optimizer steps.

A callback and not Lightning's validation loop, whose place between steps is part of what a checkpoint restores: here a
checkpoint is always taken after the validation of its step.
"""

import lightning as L
import numpy as np

from bitnet_train.evaluation.bits_per_byte import TextLoss, windows_loss
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.datamodule import ShardDataModule
from bitnet_train.training.module import PretrainingModule, TrainingModule


class Validation(StepCallback):
    """Evaluates every ``trainer.validate_every`` steps and at the end; the last result stays in ``result``."""

    def __init__(self, clock: TrainingClock, data: ShardDataModule, byte_lengths: np.ndarray) -> None:
        self.clock, self.byte_lengths = clock, byte_lengths
        self.loader = data.validation_loader()
        self.result: TextLoss | None = None

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        assert isinstance(module, PretrainingModule)
        if not due(step, module.cfg.trainer.validate_every, module.cfg.trainer.max_steps):
            return
        with self.clock.paused():
            module.decoder.eval()
            with trainer.precision_plugin.forward_context():
                self.result = windows_loss(module.decoder, self.loader, self.byte_lengths, bos_id=module.bos_id)
            module.decoder.train()
        for logger in trainer.loggers:
            logger.log_metrics({"val/loss": self.result.loss, "val/bits_per_byte": self.result.bits_per_byte}, step)
