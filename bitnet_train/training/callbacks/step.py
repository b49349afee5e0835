"""Callbacks that act once per optimizer step, and a clock that leaves out what is not training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning as L

from bitnet_train.training.module import TrainingModule


class StepCallback(L.Callback):
    """Base: :meth:`on_step_end` is called once after every optimizer step, whatever the accumulation.

    Lightning's batch hooks count micro-batches. Callbacks act in the order of the trainer's list.
    """

    _seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            assert isinstance(pl_module, TrainingModule)
            self.on_step_end(trainer, pl_module, self._seen)

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        """Called after optimizer step number ``step`` (counted from 1)."""


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every ``every`` steps and at the ``last`` one happens at ``step``."""
    return every is not None and (step % every == 0 or step == last)


def flush_loggers(trainer: L.Trainer) -> None:
    """Have the loggers write what they hold before the run stops for a worse reason than that they cannot."""
    for logger in trainer.loggers:
        with suppress(OSError):
            logger.save()


class TrainingClock:
    """Seconds spent training: wall time without validation, samples and saving."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0

    def seconds(self) -> float:
        """Training seconds since the clock was made."""
        return time.perf_counter() - self._start - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start
