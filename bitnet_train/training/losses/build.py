"""From a configuration to the loss that it names."""

from collections.abc import Callable

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.training.losses.config import CrossEntropyLoss, DistillationLoss, LossConfig
from bitnet_train.training.losses.cross_entropy import CrossEntropy
from bitnet_train.training.losses.distillation import Distillation
from bitnet_train.training.losses.parts import Loss

# Add a loss: a dataclass in training.losses.config.LOSS_CONFIGS, and a builder (config, model's shape -> Loss) here.
LOSSES: dict[type[LossConfig], Callable[..., Loss]] = {
    CrossEntropyLoss: lambda cfg, model: CrossEntropy(cfg),
    DistillationLoss: Distillation,
}


def build_loss(cfg: LossConfig, model: DecoderConfig) -> Loss:
    """The loss of a configuration."""
    if type(cfg) not in LOSSES:
        raise ConfigError(f"loss={cfg.name} has no entry in bitnet_train.training.losses.build.LOSSES")
    return LOSSES[type(cfg)](cfg, model)
