"""Learning rate and weight decay as pure functions of the step.

Every schedule is a factor of the peak in ``optimizer.lr`` or ``optimizer.weight_decay``. Steps count from 0; step ``t``
is the update that makes ``t + 1`` updates in all. Nothing but the step is needed to resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitnet_train.errors import ConfigError
from bitnet_train.training.schedules.config import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleConfig,
    Shape,
    TwoStageSchedule,
    WsdSchedule,
)


@dataclass(frozen=True)
class Factors:
    """Factors of the peak learning rate and of the peak weight decay."""

    lr: float
    weight_decay: float = 1.0


def glide(shape: Shape, start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1: constant stays at start, linear, or half a cosine."""
    progress = min(max(progress, 0.0), 1.0)
    if shape is Shape.constant:
        return start
    if shape is Shape.linear:
        return start + (end - start) * progress
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def as_steps(value: float, total: int) -> int:
    """A number of steps: ``value`` itself, or below 1 that share of ``total``, rounded."""
    return round(value * total) if value < 1 else round(value)


def _progress(step: int, first: int, end: int) -> float:
    """Position of ``step`` in the span [first, end): 0 at its first step, 1 at its last."""
    return (step - first) / max(1, end - 1 - first)


def _constant(cfg: ConstantSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(1.0)


def _linear(cfg: LinearSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(glide(Shape.linear, 1.0, cfg.final, _progress(step, warm, total)))


def _cosine(cfg: CosineSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(glide(Shape.cosine, 1.0, cfg.final, _progress(step, warm, total)))


def _wsd(cfg: WsdSchedule, step: int, warm: int, total: int) -> Factors:
    first = total - as_steps(cfg.decay, total)
    # The last stable step counts as the decay's start, so that the decay's first step already falls.
    return Factors(1.0 if step < first else glide(cfg.shape, 1.0, cfg.final, _progress(step, first - 1, total)))


def _two_stage(cfg: TwoStageSchedule, step: int, warm: int, total: int) -> Factors:
    first = 0
    passed = 0.0
    for number, stage in enumerate(cfg.stages):
        passed += stage.share
        end = total if number == len(cfg.stages) - 1 else round(passed * total)
        if step < end or end == total:
            progress = _progress(step, max(first, warm), end)
            return Factors(
                glide(stage.shape, stage.lr, stage.final or 0.0, progress),
                glide(
                    stage.weight_decay_shape,
                    stage.weight_decay,
                    stage.weight_decay_final or 0.0,
                    _progress(step, first, end),
                ),
            )
        first = end
    raise ConfigError("schedule.stages is empty: give at least one stage.")


# Add a schedule: a dataclass in training.config.SCHEDULE_CONFIGS, and its function here.
# A function (config, step, warm-up steps, total steps) -> Factors.
SCHEDULES: dict[type[ScheduleConfig], Callable[..., Factors]] = {
    ConstantSchedule: _constant,
    LinearSchedule: _linear,
    CosineSchedule: _cosine,
    WsdSchedule: _wsd,
    TwoStageSchedule: _two_stage,
}


def schedule_factors(cfg: ScheduleConfig, step: int, total: int) -> Factors:
    """Factors at ``step`` of a run of ``total`` steps, linear warm-up of the learning rate included."""
    warm = as_steps(cfg.warmup, total)
    factors = SCHEDULES[type(cfg)](cfg, step, warm, total)
    if step >= warm:
        return factors
    peak = SCHEDULES[type(cfg)](cfg, warm, warm, total).lr
    return Factors(peak * (step + 1) / warm, factors.weight_decay)


def learning_rate(cfg: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Learning rate of update ``step``."""
    return peak * schedule_factors(cfg, step, total).lr


def weight_decay(cfg: ScheduleConfig, decay: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Weight decay of update ``step``: the peak, times the stage's factor, times the factor of ``decay``.

    ``decay`` is a schedule for the weight decay itself (``weight_decay_schedule``); its warm-up applies to it too.
    """
    return peak * schedule_factors(cfg, step, total).weight_decay * schedule_factors(decay, step, total).lr


def check_schedule(cfg: ScheduleConfig, total: int, key: str = "schedule") -> None:
    """Raises ConfigError when the spans of a schedule do not fit into ``total`` steps or contradict themselves."""
    if type(cfg) not in SCHEDULES:
        raise ConfigError(f"{key}={cfg.name} has no entry in bitnet_train.training.schedules.factors.SCHEDULES.")
    warm = as_steps(cfg.warmup, total)
    if cfg.warmup < 0 or warm >= total:
        raise ConfigError(
            f"{key}.warmup={cfg.warmup:g} is {warm} steps, which must be shorter than the run of "
            f"trainer.max_steps={total}: shorten the warm-up or lengthen the run."
        )
    if isinstance(cfg, WsdSchedule):
        decay = as_steps(cfg.decay, total)
        if cfg.decay < 0 or warm + decay > total:
            raise ConfigError(
                f"{key}: warm-up ({warm} steps) and decay ({decay}) are longer than the run of {total} steps."
            )
    if isinstance(cfg, TwoStageSchedule):
        _check_stages(cfg, warm, total, key)
    final = getattr(cfg, "final", 0.0)
    if final < 0:
        raise ConfigError(f"{key}.final is {final:g}; it is a factor of the peak and cannot be negative.")


def _check_stages(cfg: TwoStageSchedule, warm: int, total: int, key: str) -> None:
    if not cfg.stages:
        raise ConfigError(f"{key}.stages is empty: give at least one stage, for example {{share: 1.0}}.")
    shares = sum(stage.share for stage in cfg.stages)
    if abs(shares - 1.0) > 1e-6:
        raise ConfigError(f"{key}.stages: the shares add up to {shares:g}, not to 1.")
    if warm > round(cfg.stages[0].share * total):
        raise ConfigError(f"{key}.warmup ({warm} steps) is longer than the first stage.")
    for number, stage in enumerate(cfg.stages):
        if stage.share <= 0:
            raise ConfigError(f"{key}.stages[{number}].share must be positive, it is {stage.share:g}.")
        for shape, final, name in (
            (stage.shape, stage.final, "final"),
            (stage.weight_decay_shape, stage.weight_decay_final, "weight_decay_final"),
        ):
            if shape is Shape.constant and final is not None:
                raise ConfigError(
                    f"{key}.stages[{number}].{name} has no effect while that shape is constant: remove it."
                )
        decays = (stage.weight_decay, stage.weight_decay_shape, stage.weight_decay_final)
        if key == "weight_decay_schedule" and decays != (1.0, Shape.constant, None):
            raise ConfigError(
                f"{key}.stages[{number}]: here lr, shape and final are the weight decay's; weight_decay, "
                "weight_decay_shape and weight_decay_final have no effect: remove them."
            )
