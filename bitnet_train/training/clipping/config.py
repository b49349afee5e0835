"""Gradient clipping: the ``clip`` part of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import MISSING

from bitnet_train.errors import ConfigError
from bitnet_train.steps import as_steps
from bitnet_train.training.schedules.config import Shape
from bitnet_train.variants import variant_from

# Steps whose norms can be remembered: all of them are read in every step.
LONGEST_WINDOW = 100_000

# What adaptive clipping leaves alone where clip.exclude is null. Tied embeddings are the head too.
EMBEDDING_AND_HEAD = ("*embed_tokens.weight", "*positions.weight", "*head.weight", "*head.bias")


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
class ScheduledClip(ClipConfig):
    """A largest norm that moves over the first steps and then stays."""

    name: str = "scheduled"
    # Largest L2 norm of the whole gradient in the first step: smaller than max_norm while the first gradients of new
    # ternary weights are wild, or larger to tighten later.
    start: float = 0.5
    # Largest L2 norm from step number `steps` on.
    max_norm: float = 1.0
    # Length of the way: a number of steps, or below 1 a share of trainer.max_steps.
    steps: float = 0.2
    # The way from start to max_norm: linear or cosine.
    shape: Shape = Shape.linear


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


class ZScoreTarget(Enum):
    """The z-score that a spike is brought down to: z_threshold^2 / z, z_threshold itself, or 0."""

    reciprocal = "reciprocal"
    threshold = "threshold"
    mean = "mean"


@dataclass
class ZScoreClip(ClipConfig):
    """ZClip (Kumar et al. 2025, arXiv 2504.02507): clips norms that lie far above their moving average."""

    name: str = "zscore"
    # A norm is a spike when it lies more than this many standard deviations above the mean (2.5 in the paper).
    z_threshold: float = 2.5
    # What a spike of z-score z is clipped to: reciprocal (the paper's: mean + z_threshold^2 / z deviations, the harder
    # the larger the spike), threshold (mean + z_threshold deviations) or mean.
    target: ZScoreTarget = ZScoreTarget.reciprocal
    # How much of the moving mean and variance stays at each step (0.97 in the paper).
    alpha: float = 0.97
    # Steps whose norms make the first mean and variance (25 in the paper's code).
    warmup: int = 25
    # Threshold of those steps.
    initial: float = 1.0
    # Largest norm in any step, whatever the statistics allow; null for none.
    max_norm: float | None = None


@dataclass
class AdaptiveClip(ClipConfig):
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, equation 3): a limit for every output unit."""

    name: str = "adaptive"
    # Largest ratio of gradient norm to weight norm of a row of a matrix, or of a whole vector (0.01 in the paper).
    factor: float = 0.01
    # Weight norms count as at least this much, so that units that start at zero can grow (1e-3 in the paper).
    eps: float = 1e-3
    # Patterns of the names of parameters that are not clipped, such as ["*norm.weight"]; null for the embedding and the
    # head, and the positions of an image classifier (the paper leaves the last layer alone).
    exclude: list[str] | None = None


@dataclass
class PatternRule:
    """The clip rule of the parameters whose names match a pattern."""

    # Parameter-name pattern with * and ?, for example "*.o_proj.weight" or "layers.0.*"; the last match wins.
    pattern: str = MISSING
    # Any clip rule with its settings, for example {name: norm, max_norm: 0.5}; it sees these parameters only.
    clip: dict[str, Any] = field(default_factory=dict)


@dataclass
class ByPatternClip(ClipConfig):
    """Rules by parameter name, each with a norm, a threshold and a memory of its own."""

    name: str = "by_pattern"
    # Every parameter needs a rule: start with the pattern "*", then the exceptions.
    rules: list[PatternRule] = field(default_factory=list)


CLIP_CONFIGS: dict[str, type[ClipConfig]] = {
    "none": NoClip,
    "norm": NormClip,
    "scheduled": ScheduledClip,
    "percentile": PercentileClip,
    "zscore": ZScoreClip,
    "adaptive": AdaptiveClip,
    "by_pattern": ByPatternClip,
}


def inner_clips(cfg: ByPatternClip, where: str = "clip") -> list[ClipConfig]:
    """The typed clip rule of each of ``cfg.rules``. Raises ConfigError for one that is none."""
    registry = {name: kind for name, kind in CLIP_CONFIGS.items() if kind is not ByPatternClip}
    return [variant_from(rule.clip, registry, f"{where}.rules[{i}].clip") for i, rule in enumerate(cfg.rules)]


def deciding_rule(patterns: Sequence[str], name: str) -> int | None:
    """The number of the last of ``patterns`` that matches the parameter ``name``, or None."""
    return next((i for i in range(len(patterns) - 1, -1, -1) if fnmatchcase(name, patterns[i])), None)


def check_clip(cfg: ClipConfig, names: Sequence[str], total: int, where: str = "clip") -> None:
    """Raises ConfigError for thresholds that cannot be.

    Args:
        cfg: the rule.
        names: the parameters that it clips.
        total: trainer.max_steps.
        where: the rule's key in the configuration, for messages.
    """
    if isinstance(cfg, NormClip) and cfg.max_norm <= 0:
        raise ConfigError(f"{where}.max_norm must be positive, it is {cfg.max_norm:g}; use clip=none for no clipping.")
    if isinstance(cfg, ScheduledClip):
        _check_scheduled(cfg, total, where)
    if isinstance(cfg, PercentileClip):
        if not 0 < cfg.percentile <= 100:
            raise ConfigError(f"{where}.percentile must be above 0 and at most 100, it is {cfg.percentile:g}.")
        if cfg.initial <= 0 or not 1 <= cfg.min_history <= cfg.window:
            raise ConfigError(f"{where}.initial must be positive and {where}.min_history between 1 and {where}.window.")
        if cfg.window > LONGEST_WINDOW:
            raise ConfigError(f"{where}.window is {cfg.window}; at most {LONGEST_WINDOW} past norms can be remembered.")
    if isinstance(cfg, ZScoreClip):
        if cfg.z_threshold <= 0 or cfg.initial <= 0 or (cfg.max_norm is not None and cfg.max_norm <= 0):
            raise ConfigError(
                f"{where}.z_threshold, {where}.initial and {where}.max_norm must be positive (max_norm may be null)."
            )
        if not 0 < cfg.alpha < 1:
            raise ConfigError(f"{where}.alpha must lie between 0 and 1, it is {cfg.alpha:g} (the paper's is 0.97).")
        if cfg.warmup < 2:
            raise ConfigError(f"{where}.warmup is {cfg.warmup}; a variance needs at least 2 norms (the paper's is 25).")
    if isinstance(cfg, AdaptiveClip):
        if cfg.factor <= 0 or cfg.eps <= 0:
            raise ConfigError(f"{where}.factor and {where}.eps must be positive.")
        for pattern in cfg.exclude or []:
            if not any(fnmatchcase(name, str(pattern)) for name in names):
                raise ConfigError(_matches_nothing(f"{where}.exclude", str(pattern), names))
        if names and all(any(fnmatchcase(name, str(p)) for p in cfg.exclude or []) for name in names):
            raise ConfigError(f"{where}.exclude leaves no parameter to clip: leave some, or use clip=none.")
    if isinstance(cfg, ByPatternClip):
        _check_patterns(cfg, names, total, where)


def _check_scheduled(cfg: ScheduledClip, total: int, where: str) -> None:
    if cfg.start <= 0 or cfg.max_norm <= 0:
        raise ConfigError(f"{where}.start and {where}.max_norm must be positive; use clip=none for no clipping.")
    if cfg.shape is Shape.constant:
        raise ConfigError(f"{where}.shape=constant never moves: use clip=norm, or the shape linear or cosine.")
    steps = as_steps(cfg.steps, total, f"{where}.steps")
    if cfg.steps <= 0 or (total and not 1 <= steps <= total):
        raise ConfigError(
            f"{where}.steps={cfg.steps:g} is {steps} steps, which must be at least 1 and at most the "
            f"{total} of trainer.max_steps."
        )


def _check_patterns(cfg: ByPatternClip, names: Sequence[str], total: int, where: str) -> None:
    patterns = [rule.pattern for rule in cfg.rules]
    decided: dict[int, list[str]] = {i: [] for i in range(len(patterns))}
    for i, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(_matches_nothing(f"{where}.rules[{i}]", pattern, names))
    for name in names:
        chosen = deciding_rule(patterns, name)
        if chosen is None:
            raise ConfigError(
                f'{where}.rules: no pattern matches the parameter {name}: begin with a rule for "*", for example '
                "{pattern: '*', clip: {name: norm, max_norm: 1.0}}."
            )
        decided[chosen].append(name)
    for i, (pattern, inner) in enumerate(zip(patterns, inner_clips(cfg, where), strict=True)):
        if not decided[i]:
            raise ConfigError(
                f"{where}.rules[{i}]: later patterns match every parameter that '{pattern}' does, and the last match "
                "wins: put general patterns before special ones."
            )
        check_clip(inner, decided[i], total, f"{where}.rules[{i}].clip")


def _matches_nothing(key: str, pattern: str, names: Sequence[str]) -> str:
    example = next((name for name in names if name.count(".") > 2), names[0] if names else "")
    return f"{key}: the pattern '{pattern}' matches no parameter here; names look like '{example}'."
