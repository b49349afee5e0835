"""Gradient clipping: the ``clip`` part of the configuration."""

from dataclasses import dataclass

from omegaconf import MISSING

from bitnet_train.errors import ConfigError


@dataclass
class ClipConfig:
    """Base of the gradient-clipping rules; every subclass is an option of the ``clip`` group."""

    name: str = MISSING


@dataclass
class NoClip(ClipConfig):
    name: str = "none"


@dataclass
class NormClip(ClipConfig):
    name: str = "norm"
    # Largest L2 norm of the whole gradient.
    max_norm: float = 1.0


@dataclass
class PercentileClip(ClipConfig):
    """AutoClip (Seetharaman et al. 2020): the threshold is a percentile of the norms seen so far."""

    name: str = "percentile"
    # Percentile of the past norms, 0 to 100.
    percentile: float = 90.0
    # How many past norms are remembered.
    window: int = 256
    # Threshold of the first steps, until min_history norms are known.
    initial: float = 1.0
    # Norms that must be known before the percentile is used.
    min_history: int = 16


CLIP_CONFIGS: dict[str, type[ClipConfig]] = {"none": NoClip, "norm": NormClip, "percentile": PercentileClip}


def check_clip(cfg: ClipConfig) -> None:
    """Raises ConfigError for thresholds that cannot be."""
    if isinstance(cfg, NormClip) and cfg.max_norm <= 0:
        raise ConfigError(f"clip.max_norm must be positive, it is {cfg.max_norm:g}; use clip=none for no clipping.")
    if isinstance(cfg, PercentileClip):
        if not 0 < cfg.percentile <= 100:
            raise ConfigError(f"clip.percentile must be above 0 and at most 100, it is {cfg.percentile:g}.")
        if cfg.initial <= 0 or not 1 <= cfg.min_history <= cfg.window:
            raise ConfigError("clip.initial must be positive and clip.min_history between 1 and clip.window.")
