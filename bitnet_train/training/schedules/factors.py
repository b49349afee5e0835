"""Learning rate and weight decay as pure functions of the step.

Every schedule is a factor of the peak in ``optimizer.lr`` or ``optimizer.weight_decay``. Steps count from 0; step ``t``
is the update that makes ``t + 1`` updates in all. Nothing but the step is needed to resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitnet_train.errors import ConfigError
from bitnet_train.steps import as_steps
from bitnet_train.training.schedules.config import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    PolynomialSchedule,
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


# Shapes that divide by the ends of their way, which must be above zero.
POSITIVE = (Shape.exponential, Shape.inverse, Shape.inverse_sqrt)


def glide(shape: Shape, start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1 (constant: stays at ``start``).

    With p the progress: linear ``start + (end - start) p``; cosine ``end + (start - end) (1 + cos(pi p)) / 2``;
    one_minus_sqrt ``end + (start - end) (1 - sqrt(p))`` (arXiv 2405.18392, section 4); exponential
    ``start (end / start)^p`` (arXiv 2404.06395, section 4.2); inverse ``1 / (p / end + (1 - p) / start)``
    (arXiv 2410.05192); inverse_sqrt ``(p / end^2 + (1 - p) / start^2)^-0.5``. Both ends of the last three are positive.
    """
    progress = min(max(progress, 0.0), 1.0)
    if shape is Shape.constant:
        return start
    if shape is Shape.linear:
        return start + (end - start) * progress
    if shape is Shape.cosine:
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape is Shape.one_minus_sqrt:
        return end + (start - end) * (1.0 - math.sqrt(progress))
    if shape is Shape.exponential:
        return start * (end / start) ** progress
    power = 1 if shape is Shape.inverse else 2
    return start * (1.0 + ((start / end) ** power - 1.0) * progress) ** (-1 / power)


def _progress(step: int, first: int, end: int) -> float:
    """Position of ``step`` in the span [first, end): 0 at its first step, 1 at its last."""
    return (step - first) / max(1, end - 1 - first)


def _constant(cfg: ConstantSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(1.0)


def _linear(cfg: LinearSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(glide(Shape.linear, 1.0, cfg.final, _progress(step, warm, total)))


def _cosine(cfg: CosineSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(glide(Shape.cosine, 1.0, cfg.final, _progress(step, warm, total)))


def _polynomial(cfg: PolynomialSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(cfg.final + (1.0 - cfg.final) * (1.0 - _progress(step, warm, total)) ** cfg.power)


def _exponential(cfg: ExponentialSchedule, step: int, warm: int, total: int) -> Factors:
    return Factors(glide(Shape.exponential, 1.0, cfg.final, _progress(step, warm, total)))


def _inverse_sqrt(cfg: InverseSqrtSchedule, step: int, warm: int, total: int) -> Factors:
    timescale = warm if cfg.timescale is None else as_steps(cfg.timescale, total)

    def stable(at: int) -> float:
        return float((1.0 + max(0, at - warm) / timescale) ** -0.5)

    first = total - as_steps(cfg.decay, total)
    if step < first:
        return Factors(stable(step))
    # From the last step before the cooldown, as in WSD.
    start = stable(first - 1)
    return Factors(glide(cfg.shape, start, cfg.final, _progress(step, first - 1, total)))


def _wsd(cfg: WsdSchedule, step: int, warm: int, total: int) -> Factors:
    first = total - as_steps(cfg.decay, total)
    # The last stable step counts as the decay's start, so that the decay's first step already falls.
    return Factors(1.0 if step < first else glide(cfg.shape, 1.0, cfg.final, _progress(step, first - 1, total)))


def stage_borders(cfg: TwoStageSchedule, total: int) -> list[int]:
    """The step that each stage ends before; the last is ``total``."""
    borders, passed = [], 0.0
    for stage in cfg.stages[:-1]:
        passed += stage.share
        borders.append(round(passed * total))
    return [*borders, total]


def _two_stage(cfg: TwoStageSchedule, step: int, warm: int, total: int) -> Factors:
    first = 0
    for stage, end in zip(cfg.stages, stage_borders(cfg, total), strict=True):
        if step < end or end == total:
            return Factors(
                glide(stage.shape, stage.lr, stage.final or 0.0, _progress(step, max(first, warm), end)),
                glide(
                    stage.weight_decay_shape,
                    stage.weight_decay,
                    stage.weight_decay_final or 0.0,
                    _progress(step, first, end),
                ),
            )
        first = end
    raise ConfigError("schedule.stages is empty: give at least one stage.")


# Add a schedule: a dataclass in training.schedules.config.SCHEDULE_CONFIGS, and its function here.
# A function (config, step, warm-up steps, total steps) -> Factors.
SCHEDULES: dict[type[ScheduleConfig], Callable[..., Factors]] = {
    ConstantSchedule: _constant,
    LinearSchedule: _linear,
    CosineSchedule: _cosine,
    PolynomialSchedule: _polynomial,
    ExponentialSchedule: _exponential,
    InverseSqrtSchedule: _inverse_sqrt,
    WsdSchedule: _wsd,
    TwoStageSchedule: _two_stage,
}


def schedule_factors(cfg: ScheduleConfig, step: int, total: int) -> Factors:
    """Factors at ``step`` of a run of ``total`` steps, warm-up of the learning rate included.

    The warm-up goes from ``warmup_start`` times its peak, one step before the first, to its peak in its last step. The
    peak is the schedule's own value right after it.
    """
    warm = as_steps(cfg.warmup, total)
    factors = SCHEDULES[type(cfg)](cfg, step, warm, total)
    if step >= warm:
        return factors
    peak = SCHEDULES[type(cfg)](cfg, warm, warm, total).lr
    if cfg.warmup_shape is Shape.linear:
        start = cfg.warmup_start
        return Factors(start * peak + (1.0 - start) * peak * (step + 1) / warm, factors.weight_decay)
    return Factors(peak * glide(cfg.warmup_shape, cfg.warmup_start, 1.0, (step + 1) / warm), factors.weight_decay)


def learning_rate(cfg: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Learning rate of update ``step``."""
    return peak * schedule_factors(cfg, step, total).lr


def weight_decay(cfg: ScheduleConfig, decay: ScheduleConfig, peak: float, step: int, total: int) -> float:
    """Weight decay of update ``step``: the peak, times the stage's factor, times the factor of ``decay``.

    ``decay`` is a schedule for the weight decay itself (``weight_decay_schedule``); its warm-up applies to it too.
    """
    return peak * schedule_factors(cfg, step, total).weight_decay * schedule_factors(decay, step, total).lr
