"""The rates of a step by the configuration. No torch here: ``command=estimate`` draws them."""

from dataclasses import dataclass

from bitnet_train.training.config import RunConfig
from bitnet_train.training.schedules.factors import learning_rate, weight_decay


@dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay of one update, before the factors of parameter groups."""

    lr: float
    weight_decay: float


def rates(cfg: RunConfig, step: int) -> Rates:
    """The rates of update ``step`` (from 0): the optimizer's peaks times the factors of the schedules."""
    total = cfg.trainer.max_steps
    return Rates(
        learning_rate(cfg.schedule, cfg.optimizer.lr, step, total),
        weight_decay(cfg.schedule, cfg.weight_decay_schedule, cfg.optimizer.weight_decay, step, total),
    )
