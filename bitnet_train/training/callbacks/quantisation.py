"""Progressive quantisation on the way: the state of each step, set after the step before."""

import lightning as L

from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import block_count
from bitnet_train.nn.progress import QuantProgress
from bitnet_train.nn.vision.base import Classifier
from bitnet_train.quant.progress import QuantState, quant_state
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.config import RunConfig
from bitnet_train.training.module import TrainingModule


def state_at(cfg: RunConfig, network: Decoder | Classifier, step: int) -> QuantState:
    """What is quantised how in step ``step`` (from 0)."""
    return quant_state(cfg.quant.progressive, network.spec, step, cfg.trainer.max_steps, block_count(cfg.model))


class Quantisation(StepCallback):
    """Puts the model into the state of the next step; last of the callbacks, so that the others see what trained."""

    def __init__(self, cfg: RunConfig, network: Decoder | Classifier) -> None:
        self.cfg, self.network = cfg, network
        self.progress = QuantProgress(network, cfg.seed)

    def set(self, step: int, module: TrainingModule | None = None) -> None:
        """Put the model into the state of step ``step`` (from 0)."""
        cache = None if module is None else module.code_cache
        self.progress.apply(state_at(self.cfg, self.network, step), step, cache)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainingModule)
        self.set(trainer.global_step, pl_module)  # again: now the weights are on their device

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        if step < self.cfg.trainer.max_steps:
            self.set(step, module)
