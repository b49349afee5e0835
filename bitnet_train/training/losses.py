"""Losses: functions of the decoder's logits and the target ids."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.training.config import CrossEntropyLoss, LossConfig

# (logits (batch, tokens, vocab), targets (batch, tokens)) -> scalar mean over all tokens
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood per token in nats, computed in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# Add a loss: a dataclass in training.config.LOSS_CONFIGS, and a builder (config -> Loss) here.
LOSSES: dict[type[LossConfig], Callable[..., Loss]] = {CrossEntropyLoss: lambda cfg: cross_entropy}


def build_loss(cfg: LossConfig) -> Loss:
    """The loss of a configuration."""
    if type(cfg) not in LOSSES:
        raise ConfigError(f"loss={cfg.name} has no entry in bitnet_train.training.losses.LOSSES")
    return LOSSES[type(cfg)](cfg)
