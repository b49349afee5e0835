"""Rules that a schedule must keep. No torch here, so that a mistake is answered at once."""

import math
from dataclasses import fields

from bitnet_train.errors import ConfigError
from bitnet_train.steps import as_steps
from bitnet_train.training.schedules.config import (
    ExponentialSchedule,
    InverseSqrtSchedule,
    PolynomialSchedule,
    ScheduleConfig,
    Shape,
    StageConfig,
    TwoStageSchedule,
    WsdSchedule,
)
from bitnet_train.training.schedules.factors import POSITIVE, SCHEDULES, stage_borders


def check_schedule(cfg: ScheduleConfig, total: int, key: str = "schedule") -> None:
    """Raises ConfigError when the spans of a schedule do not fit into ``total`` steps or contradict themselves."""
    if type(cfg) not in SCHEDULES:
        raise ConfigError(f"{key}={cfg.name} has no entry in bitnet_train.training.schedules.factors.SCHEDULES.")
    check_finite(cfg, key)
    warm = _check_warm_up(cfg, total, key)
    if isinstance(cfg, WsdSchedule | InverseSqrtSchedule):
        _check_decay(cfg, warm, total, key)
    if isinstance(cfg, InverseSqrtSchedule):
        _check_timescale(cfg, warm, total, key)
    if isinstance(cfg, TwoStageSchedule):
        _check_stages(cfg, warm, total, key)
    if isinstance(cfg, PolynomialSchedule) and cfg.power <= 0:
        raise ConfigError(f"{key}.power must be positive, it is {cfg.power:g}: 1 is a line, 2 a parabola.")
    final = getattr(cfg, "final", 0.0)
    if final < 0:
        raise ConfigError(f"{key}.final is {final:g}; it is a factor of the peak and cannot be negative.")
    if isinstance(cfg, ExponentialSchedule) and final == 0:
        raise ConfigError(f"{key}.final is 0, which {key}=exponential never reaches: give a factor above 0.")


def check_finite(cfg: object, key: str) -> None:
    """Raises ConfigError for a number of a config dataclass that is infinite or not a number."""
    for entry in fields(cfg):  # type: ignore[arg-type]
        value = getattr(cfg, entry.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}.{entry.name} is {value}: give a finite number.")


def _check_warm_up(cfg: ScheduleConfig, total: int, key: str) -> int:
    warm = as_steps(cfg.warmup, total, f"{key}.warmup")
    if cfg.warmup < 0 or warm >= total:
        raise ConfigError(
            f"{key}.warmup={cfg.warmup:g} is {warm} steps, which must be shorter than the run of "
            f"trainer.max_steps={total}: shorten the warm-up or lengthen the run."
        )
    if not 0 <= cfg.warmup_start <= 1:
        raise ConfigError(f"{key}.warmup_start is {cfg.warmup_start:g}; it is a factor of the peak, from 0 to 1.")
    if cfg.warmup == 0 and (cfg.warmup_start != 0 or cfg.warmup_shape is not Shape.linear):
        raise ConfigError(
            f"{key}.warmup_start and {key}.warmup_shape have no effect without {key}.warmup: remove them."
        )
    if cfg.warmup_start == 0 and (cfg.warmup_shape is Shape.constant or cfg.warmup_shape in POSITIVE):
        raise ConfigError(
            f"{key}.warmup_shape={cfg.warmup_shape.value} never leaves {key}.warmup_start=0: give a start above 0."
        )
    return warm


def _check_decay(cfg: WsdSchedule | InverseSqrtSchedule, warm: int, total: int, key: str) -> None:
    decay = as_steps(cfg.decay, total, f"{key}.decay")
    if cfg.decay < 0 or warm + decay > total:
        raise ConfigError(
            f"{key}: warm-up ({warm} steps) and decay ({decay}) are longer than the run of {total} steps."
        )
    if cfg.decay == 0 and (cfg.final != 0 or cfg.shape is not Shape.linear):
        raise ConfigError(f"{key}.shape and {key}.final have no effect without {key}.decay: remove them.")
    if cfg.decay > 0 and cfg.shape in POSITIVE and cfg.final <= 0:
        raise ConfigError(
            f"{key}.final is {cfg.final:g}, which {key}.shape={cfg.shape.value} never reaches: give a factor above 0."
        )


def _check_timescale(cfg: InverseSqrtSchedule, warm: int, total: int, key: str) -> None:
    if cfg.timescale is None and warm == 0:
        raise ConfigError(f"{key}.timescale=null takes the warm-up's length, but there is none: give one of both.")
    if cfg.timescale is not None and (cfg.timescale <= 0 or as_steps(cfg.timescale, total, f"{key}.timescale") < 1):
        raise ConfigError(
            f"{key}.timescale={cfg.timescale:g} is less than a step of trainer.max_steps={total}: give at least 1 step."
        )


def _check_stages(cfg: TwoStageSchedule, warm: int, total: int, key: str) -> None:
    if not cfg.stages:
        raise ConfigError(f"{key}.stages is empty: give at least one stage, for example {{share: 1.0}}.")
    for number, stage in enumerate(cfg.stages):
        check_finite(stage, f"{key}.stages[{number}]")
        if stage.share <= 0:
            raise ConfigError(f"{key}.stages[{number}].share must be positive, it is {stage.share:g}.")
    shares = sum(stage.share for stage in cfg.stages)
    if abs(shares - 1.0) > 1e-6:
        raise ConfigError(f"{key}.stages: the shares add up to {shares:g}, not to 1.")
    first = 0
    for number, end in enumerate(stage_borders(cfg, total)):
        if end <= first:
            raise ConfigError(
                f"{key}.stages[{number}].share={cfg.stages[number].share:g} is not a single one of the {total} steps: "
                "lengthen trainer.max_steps or the stage."
            )
        first = end
    border = stage_borders(cfg, total)[0]
    if warm >= border:
        raise ConfigError(f"{key}.warmup ({warm} steps) must be shorter than the first stage ({border} steps).")
    for number, stage in enumerate(cfg.stages):
        _check_stage(stage, f"{key}.stages[{number}]")
        decays = (stage.weight_decay, stage.weight_decay_shape, stage.weight_decay_final)
        if key == "weight_decay_schedule" and decays != (1.0, Shape.constant, None):
            raise ConfigError(
                f"{key}.stages[{number}]: here lr, shape and final are the weight decay's; weight_decay, "
                "weight_decay_shape and weight_decay_final have no effect: remove them."
            )


def _check_stage(stage: StageConfig, key: str) -> None:
    for name in ("lr", "final", "weight_decay", "weight_decay_final"):
        factor = getattr(stage, name)
        if factor is not None and factor < 0:
            raise ConfigError(f"{key}.{name} is {factor:g}; it is a factor of the peak and cannot be negative.")
    for shape, start, final, name in (
        (stage.shape, stage.lr, stage.final, "final"),
        (stage.weight_decay_shape, stage.weight_decay, stage.weight_decay_final, "weight_decay_final"),
    ):
        if shape is Shape.constant and final is not None:
            raise ConfigError(f"{key}.{name} has no effect while that shape is constant: remove it.")
        if shape in POSITIVE and not (start > 0 and final is not None and final > 0):
            raise ConfigError(
                f"{key}: a way that is {shape.value} goes between factors above 0: give {name}, and start above 0."
            )
