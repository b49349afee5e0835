"""Ctrl-C and termination: finish the optimizer step, save, stop, and say so in the exit code."""

import signal
from types import FrameType
from typing import Any

import lightning as L

from bitnet_train.training.callbacks.checkpoint import Checkpoints
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.distributed import group
from bitnet_train.training.module import TrainingModule

# Exit codes that shells expect: 128 + signal number.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopOnSignal(StepCallback):
    """The first SIGINT or SIGTERM asks for a stop after the step at hand; a second Ctrl-C stops at once, unsaved.

    ``exit_code`` is that of the signal once the run has stopped for it, otherwise 0.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self.exit_code = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # After Lightning's connector has installed its own handlers, which would end with exit code 0.
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._receive)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        if group.world() > 1:  # a signal may reach one process alone, or reach them in different steps
            self.received = group.largest(self.received or 0)[0] or None
        if self.received is None:
            return
        self.checkpoints.save(trainer, module, step)
        self.exit_code = EXIT_CODES[signal.Signals(self.received)]
        trainer.should_stop = True
