"""Progressive quantisation on the way: the state of each step, set after the step before."""

import lightning as L

from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.progress import QuantProgress
from bitnet_train.quant.progress import QuantState, quant_state
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.config import RunConfig
from bitnet_train.training.module import PretrainingModule


def state_at(cfg: RunConfig, decoder: Decoder, step: int) -> QuantState:
    """What is quantised how in step ``step`` (from 0)."""
    return quant_state(cfg.quant.progressive, decoder.spec, step, cfg.trainer.max_steps, cfg.model.layers)


class Quantisation(StepCallback):
    """Puts the decoder into the state of the next step; last of the callbacks, so that the others see what trained."""

    def __init__(self, cfg: RunConfig, decoder: Decoder) -> None:
        self.cfg, self.decoder = cfg, decoder
        self.progress = QuantProgress(decoder, cfg.seed)

    def set(self, step: int, module: PretrainingModule | None = None) -> None:
        """Put the decoder into the state of step ``step`` (from 0)."""
        cache = None if module is None else module.code_cache
        self.progress.apply(state_at(self.cfg, self.decoder, step), step, cache)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PretrainingModule)
        self.set(trainer.global_step, pl_module)  # again: now the weights are on their device

    def on_step_end(self, trainer: L.Trainer, module: PretrainingModule, step: int) -> None:
        if step < self.cfg.trainer.max_steps:
            self.set(step, module)
