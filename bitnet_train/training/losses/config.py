"""What is minimised: the ``loss`` part of the configuration."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class LossConfig:
    """Base of the losses; every subclass is an option of the ``loss`` group."""

    name: str = MISSING


@dataclass
class CrossEntropyLoss(LossConfig):
    name: str = "cross_entropy"


LOSS_CONFIGS: dict[str, type[LossConfig]] = {"cross_entropy": CrossEntropyLoss}
