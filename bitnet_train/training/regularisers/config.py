"""Penalties on the master weights themselves: the ``regulariser`` part of the configuration."""

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import ModelConfig
from bitnet_train.nn.layout import quantised_layers
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.steps import as_steps


@dataclass
class RegulariserConfig:
    """Base of the regularisers; every subclass is an option of the ``regulariser`` group."""

    name: str = MISSING


@dataclass
class NoRegulariser(RegulariserConfig):
    name: str = "none"


class CodeDistance(Enum):
    """How far a weight is from its code: the square of the difference in units of the scale, or its magnitude."""

    squared = "squared"
    absolute = "absolute"


class CodeTarget(Enum):
    """Where a weight with a nonzero code is pulled to: the magnitude at which the quantiser gives these codes and this
    scale back (with absmean scale / share of nonzero codes), or the scale itself."""

    fixed_point = "fixed_point"
    scale = "scale"


@dataclass
class ScheduledRegulariser(RegulariserConfig):
    """Base of those whose strength follows the step; the penalty is added to the loss with its strength."""

    # Factor of the penalty. The penalty is a mean over layers and their weights, so what pulls at one weight is divided
    # by the number of all weights, and larger models take larger strengths. It stands beside the mean loss of a token:
    # with loss.reduction=sum it weighs as many times less as a step has learnt tokens.
    strength: float = 10.0
    # First step at which it acts; below 1 that share of the run.
    start: float = 0.0
    # Steps over which it then grows, in equal parts, to its full strength; below 1 that share of the run, 0 at once.
    ramp: float = 0.0


@dataclass
class CodesRegulariser(ScheduledRegulariser):
    """Pulls weights towards their codes (mean squared quantisation error, arXiv 1809.00095)."""

    name: str = "codes"
    # First step at which it acts; below 1 that share of the run. The first half is left to find the codes.
    start: float = 0.5
    # Steps over which it then grows, in equal parts, to its full strength; below 1 that share of the run, 0 at once.
    ramp: float = 0.25
    # squared, or absolute (a pull that does not weaken near the code).
    distance: CodeDistance = CodeDistance.squared
    # fixed_point: where codes and scale stay, with absmean scale / share of nonzero codes. scale: the value in the
    # forward pass. An absmean scale is the mean magnitude of all weights, zeros included, so weights that reach it make
    # the next one smaller: with more than a little strength a ternary layer's weights shrink without end. (For binary
    # layers, learned scales, the median and the largest magnitude both are the same.)
    target: CodeTarget = CodeTarget.fixed_point


@dataclass
class EntropyRegulariser(ScheduledRegulariser):
    """Keeps the codes of each ternary layer from collapsing into one or two values."""

    name: str = "entropy"
    # Bits per weight below which a layer's codes are penalised; 1.585, the most there is, makes it the negative
    # entropy. Gaussian weights have 1.58 under the absmean quantiser.
    floor: float = 1.5
    # Width of the soft steps between codes, in units of the scale; near 0 they are the quantiser's own.
    temperature: float = 0.1


REGULARISER_CONFIGS: dict[str, type[RegulariserConfig]] = {
    "none": NoRegulariser,
    "codes": CodesRegulariser,
    "entropy": EntropyRegulariser,
}


def strength_at(cfg: ScheduledRegulariser, step: int, total: int) -> float:
    """The strength at optimizer step ``step`` (from 0) of a run of ``total``."""
    first, ramp = as_steps(cfg.start, total), as_steps(cfg.ramp, total)
    if step < first:
        return 0.0
    return cfg.strength * min(1.0, (step - first + 1) / (ramp + 1))


def check_regulariser(cfg: RegulariserConfig, model: ModelConfig, spec: QuantSpec, total: int) -> None:
    """Raises ConfigError for numbers out of range, and where there is no quantised layer to act on."""
    if not isinstance(cfg, ScheduledRegulariser):
        return
    if not (cfg.strength > 0 and math.isfinite(cfg.strength)):
        raise ConfigError(f"regulariser.strength is {cfg.strength:g}; it must be positive (or regulariser=none).")
    start = as_steps(cfg.start, total, "regulariser.start")
    whole = as_steps(cfg.ramp, total, "regulariser.ramp")
    if cfg.start < 0 or cfg.ramp < 0 or start >= total:
        raise ConfigError(
            f"regulariser.start={cfg.start:g} and regulariser.ramp={cfg.ramp:g} must not be negative, and the start "
            f"must lie before trainer.max_steps={total}."
        )
    if total and start + whole > total + 1:  # both are rounded
        raise ConfigError(
            f"regulariser.start ({start} steps) and regulariser.ramp ({whole}) are longer than "
            f"trainer.max_steps={total}, so that its strength is never reached: shorten them."
        )
    schemes = {layer.scheme for layer in quantised_layers(model, spec).values()}
    if not schemes:
        raise ConfigError(f"regulariser={cfg.name} acts on quantised layers, and quant= leaves none: use none.")
    if isinstance(cfg, EntropyRegulariser):
        if "ternary" not in schemes:
            raise ConfigError("regulariser=entropy acts on ternary layers, and quant= has none: use none or codes.")
        if not 0 < cfg.floor <= 1.585:
            raise ConfigError(f"regulariser.floor is {cfg.floor:g} bits; it must lie between 0 and 1.585, log2 of 3.")
        if not (cfg.temperature > 0 and math.isfinite(cfg.temperature)):
            raise ConfigError(f"regulariser.temperature is {cfg.temperature:g}; it must be positive.")
