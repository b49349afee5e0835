"""What happens to steps that would do harm: the ``guard`` part of the configuration."""

from dataclasses import dataclass

from bitnet_train.errors import ConfigError
from bitnet_train.training.clipping.config import LONGEST_WINDOW


@dataclass
class GuardConfig:
    # Skip a step whose loss or gradient norm is not finite: weights, optimizer state and codes stay as they are, and
    # the run goes on with the next samples. Without it such a run stops with exit code 3.
    skip_non_finite: bool = False
    # Skip a step whose loss or gradient norm lies more than this many standard deviations above the mean of the last
    # steps that were not skipped; null for never (OLMo's SkipStepOptimizer: 6).
    outlier_sigma: float | None = None
    # How many steps these statistics remember (OLMo: 128). A run without rollback_after stops with exit code 3 when so
    # many steps in a row were skipped.
    window: int = 128
    # Steps that must be known before outliers are skipped; null for half the window (as OLMo).
    min_history: int | None = None
    # After so many skipped steps in a row (they are counted one step late, so that nobody waits for the device: one
    # more may be skipped) go back to the last checkpoint of checkpoint.every_steps and on with the samples behind the
    # bad ones; null for never.
    rollback_after: int | None = None
    # How often a run may go back before it stops with exit code 3.
    max_rollbacks: int = 3

    @property
    def active(self) -> bool:
        """Whether any step can be skipped."""
        return self.skip_non_finite or self.outlier_sigma is not None

    @property
    def known_steps(self) -> int:
        """``min_history`` or its default."""
        return max(2, self.window // 2) if self.min_history is None else self.min_history


def check_guard(cfg: GuardConfig) -> None:
    """Raises ConfigError for values that cannot be and for those that would do nothing."""
    default = GuardConfig()
    if cfg.outlier_sigma is not None and cfg.outlier_sigma <= 0:
        raise ConfigError(f"guard.outlier_sigma must be positive, it is {cfg.outlier_sigma:g}; null skips no outliers.")
    if not 2 <= cfg.window <= LONGEST_WINDOW or not 2 <= cfg.known_steps <= cfg.window:
        raise ConfigError(
            f"guard.window={cfg.window} must be at least 2 and at most {LONGEST_WINDOW}, and "
            f"guard.min_history={cfg.known_steps} at least 2 and at most guard.window."
        )
    if cfg.rollback_after is not None and cfg.rollback_after < 1:
        raise ConfigError(f"guard.rollback_after is {cfg.rollback_after}; it must be at least 1, or null for never.")
    if cfg.max_rollbacks < 0:
        raise ConfigError(f"guard.max_rollbacks is {cfg.max_rollbacks}; it cannot be negative.")
    if not cfg.active and cfg != default:
        raise ConfigError(
            "guard: no step is ever skipped, so its other settings do nothing: set guard.skip_non_finite=true or "
            "guard.outlier_sigma=6."
        )
    if cfg.outlier_sigma is None and cfg.min_history is not None:
        raise ConfigError("guard.min_history has no effect without guard.outlier_sigma: remove it.")
    if cfg.outlier_sigma is None and cfg.rollback_after is not None and cfg.window != default.window:
        raise ConfigError(
            "guard.window has no effect with guard.rollback_after and without guard.outlier_sigma: remove it."
        )
    if cfg.rollback_after is None and cfg.max_rollbacks != default.max_rollbacks:
        raise ConfigError("guard.max_rollbacks has no effect without guard.rollback_after: remove it.")
