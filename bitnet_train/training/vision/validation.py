"""Validation loss and accuracy, between optimizer steps; a callback for the reasons that the one for text gives."""

import lightning as L

from bitnet_train.evaluation.classification import ImageLoss, images_loss
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.vision.datamodule import ImageDataModule
from bitnet_train.training.vision.module import ClassificationModule


class ImageValidation(StepCallback):
    """Evaluates every ``trainer.validate_every`` steps and at the end; the last result stays in ``result``."""

    def __init__(self, clock: TrainingClock, data: ImageDataModule) -> None:
        self.clock, self.data = clock, data
        self.result: ImageLoss | None = None

    @property
    def parts(self) -> str:
        """Nothing: the images are one set."""
        return ""

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        assert isinstance(module, ClassificationModule)
        if not due(step, module.cfg.trainer.validate_every, module.cfg.trainer.max_steps):
            return
        with self.clock.paused():
            module.classifier.eval()
            with trainer.precision_plugin.forward_context():
                self.result = images_loss(module.classifier, self.data.validation_batches())
            module.classifier.train()
        for logger in trainer.loggers:
            logger.log_metrics({"val/loss": self.result.loss, "val/accuracy": self.result.accuracy}, step)
