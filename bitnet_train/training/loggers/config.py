"""Where metrics go beside metrics.csv: the ``logger`` part of the configuration."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class LoggerConfig:
    """Base of the loggers beside metrics.csv; every subclass is an option of the ``logger`` group."""

    name: str = MISSING


@dataclass
class CsvLogger(LoggerConfig):
    """metrics.csv alone."""

    name: str = "csv"


@dataclass
class WandbLogger(LoggerConfig):
    """metrics.csv and Weights & Biases; offline when no key is configured."""

    name: str = "wandb"
    project: str = "bitnet_train"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    # Keep the run on this machine even if a key is configured.
    offline: bool = False


LOGGER_CONFIGS: dict[str, type[LoggerConfig]] = {"csv": CsvLogger, "wandb": WandbLogger}
