"""What is watched in every layer: the ``telemetry`` part of the configuration."""

from dataclasses import dataclass

from bitnet_train.errors import ConfigError


@dataclass
class TelemetryConfig:
    # Write a row per quantised layer to layers.csv every so many steps, and at the end; null for never.
    every_steps: int | None = 100
    # Warn when more than this share of a layer's ternary codes is zero.
    most_zeros: float = 0.95
    # Warn when a layer's scale has grown or shrunk by more than this factor since the run's first row.
    scale_factor: float = 20.0


def check_telemetry(cfg: TelemetryConfig) -> None:
    """Raises ConfigError for values that cannot be."""
    if cfg.every_steps is not None and cfg.every_steps < 1:
        raise ConfigError(f"telemetry.every_steps is {cfg.every_steps}; it must be positive, or null for never.")
    if not 0 < cfg.most_zeros <= 1:
        raise ConfigError(f"telemetry.most_zeros is {cfg.most_zeros:g}; it is a share above 0 and at most 1.")
    if cfg.scale_factor <= 1:
        raise ConfigError(f"telemetry.scale_factor is {cfg.scale_factor:g}; it must be above 1.")
    if cfg.every_steps is None and cfg != TelemetryConfig(None):
        raise ConfigError("telemetry.most_zeros and scale_factor have no effect with telemetry.every_steps=null, which "
                          "looks at no layer: remove them.")  # fmt: skip
