"""Validation loss and bits per byte, between optimizer steps.

A callback and not Lightning's validation loop, whose place between steps is part of what a checkpoint restores: here a
checkpoint is always taken after the validation of its step.
"""

import lightning as L
import numpy as np

from bitnet_train.evaluation.bits_per_byte import TextLoss, total, windows_loss
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.datamodule import ShardDataModule
from bitnet_train.training.distributed import group
from bitnet_train.training.loggers.metrics_csv import MetricsCsv
from bitnet_train.training.module import PretrainingModule, TrainingModule


class Validation(StepCallback):
    """Evaluates every ``trainer.validate_every`` steps and at the end; the last result stays in ``result``.

    ``by_corpus`` holds the results of a mixture's corpora, which add up to it.
    """

    def __init__(self, clock: TrainingClock, data: ShardDataModule, byte_lengths: np.ndarray) -> None:
        self.clock, self.byte_lengths = clock, byte_lengths
        self.loaders, self.fillers = data.validation_loaders(), data.validation_fillers()
        self.result: TextLoss | None = None
        self.by_corpus: dict[str, TextLoss] = {}

    @property
    def parts(self) -> str:
        """The results of a mixture's corpora in words, to stand behind the whole."""
        found = [f"{name} {loss.bits_per_byte:.4f}" for name, loss in self.by_corpus.items()]
        return f" ({', '.join(found)})" if found else ""

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        assert isinstance(module, PretrainingModule)
        if not due(step, module.cfg.trainer.validate_every, module.cfg.trainer.max_steps):
            return
        with self.clock.paused():
            module.decoder.eval()
            with trainer.precision_plugin.forward_context():
                found = {
                    name: windows_loss(module.decoder, loader, self.byte_lengths, bos_id=module.bos_id)
                    for name, loader in self.loaders.items()
                }
                for loader in self.fillers:
                    windows_loss(module.decoder, loader, self.byte_lengths, bos_id=module.bos_id)
            module.decoder.train()
            found = {name: _of_all(loss) for name, loss in found.items()}
        self.result = total(list(found.values()))
        self.by_corpus = {name: loss for name, loss in found.items() if name}
        each = {f"val/{name}/{key}": getattr(loss, key) for name, loss in self.by_corpus.items()
                for key in ("loss", "bits_per_byte")}  # fmt: skip
        for logger in trainer.loggers:
            # The columns of metrics.csv are fixed; what belongs to a corpus is printed, and goes to other loggers.
            more = {} if isinstance(logger, MetricsCsv) else each
            logger.log_metrics(
                {"val/loss": self.result.loss, "val/bits_per_byte": self.result.bits_per_byte, **more}, step
            )


def _of_all(loss: TextLoss) -> TextLoss:
    """The sums over all processes."""
    nats, tokens, size = group.summed([loss.nats, loss.tokens, loss.bytes])
    return TextLoss(nats, int(tokens), int(size))
