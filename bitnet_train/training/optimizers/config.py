"""Update rules and their peak rates: the ``optimizer`` part of the configuration."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from bitnet_train.errors import ConfigError


@dataclass
class OptimizerConfig:
    """Base of the optimizers; every subclass is an option of the ``optimizer`` group."""

    name: str = MISSING
    # Peak learning rate; the schedule is a factor of it.
    lr: float = 1e-3
    # Peak decoupled weight decay of matrices and embeddings (not of norms and biases); schedules are factors of it.
    weight_decay: float = 0.1


@dataclass
class AdamWConfig(OptimizerConfig):
    name: str = "adamw"
    # Decay rates of the first and second moment.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # Added to the root of the second moment.
    eps: float = 1e-8


OPTIMIZER_CONFIGS: dict[str, type[OptimizerConfig]] = {"adamw": AdamWConfig}


def check_optimizer(cfg: OptimizerConfig) -> None:
    """Raises ConfigError for values that no optimizer takes."""
    if cfg.lr <= 0:
        raise ConfigError(f"optimizer.lr must be positive, it is {cfg.lr:g}.")
    if cfg.weight_decay < 0:
        raise ConfigError(f"optimizer.weight_decay cannot be negative, it is {cfg.weight_decay:g}.")
    if isinstance(cfg, AdamWConfig) and (len(cfg.betas) != 2 or not all(0 <= b < 1 for b in cfg.betas) or cfg.eps <= 0):
        raise ConfigError(
            f"optimizer.betas must be two numbers in [0, 1) and eps positive, they are {cfg.betas} and {cfg.eps:g}."
        )
