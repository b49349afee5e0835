"""Rates over the run: the ``schedule`` and ``weight_decay_schedule`` parts of the configuration."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Shape(Enum):
    """The way of a factor from the start of a span to its end; formulas in ``factors.glide``.

    It stays, or goes on a line, half a cosine, 1 - sqrt (arXiv 2405.18392), exponentially (arXiv 2404.06395), with the
    inverse on a line (arXiv 2410.05192), or with the inverse square on a line, as 1/sqrt(step) does. The last three
    never reach zero.
    """

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "one_minus_sqrt"
    exponential = "exponential"
    inverse = "inverse"
    inverse_sqrt = "inverse_sqrt"


@dataclass
class ScheduleConfig:
    """Base of the learning-rate schedules; every subclass is an option of the ``schedule`` group."""

    name: str = MISSING
    # Steps of warm-up: a number of steps, or below 1 a share of trainer.max_steps.
    warmup: float = 0.0
    # Factor of the peak that the warm-up starts from, 0 to 1: one step before the first, which is already above it.
    warmup_start: float = 0.0
    # The warm-up's way up; constant stays at warmup_start (T5's warm-up: constant with warmup_start=1).
    warmup_shape: Shape = Shape.linear


@dataclass
class ConstantSchedule(ScheduleConfig):
    name: str = "constant"


@dataclass
class LinearSchedule(ScheduleConfig):
    name: str = "linear"
    # Factor of optimizer.lr at the end.
    final: float = 0.0


@dataclass
class CosineSchedule(ScheduleConfig):
    name: str = "cosine"
    # Factor of optimizer.lr at the end.
    final: float = 0.1


@dataclass
class PolynomialSchedule(ScheduleConfig):
    """A power of the remaining way, as in fairseq's polynomial_decay, which trained BitNet (arXiv 2310.11453)."""

    name: str = "polynomial"
    # Power of the share of the run that remains; 1 is a line (BitNet, fairseq's default).
    power: float = 1.0
    # Factor of optimizer.lr at the end.
    final: float = 0.0


@dataclass
class ExponentialSchedule(ScheduleConfig):
    name: str = "exponential"
    # Factor of optimizer.lr at the end, above 0: every step multiplies the rate by the same number.
    final: float = 0.1


@dataclass
class InverseSqrtSchedule(ScheduleConfig):
    """1/sqrt(step) from the end of the warm-up (arXiv 1706.03762, 1910.10683), with an optional cooldown at the end
    (arXiv 2106.04560)."""

    name: str = "inverse_sqrt"
    # Steps after the warm-up in which the rate falls to 1/sqrt(2); below 1 a share of trainer.max_steps. Null takes the
    # warm-up's length, which makes the rate sqrt(warmup / step), as in the Transformer and T5.
    timescale: float | None = None
    # Length of the cooldown at the end: a number of steps, or below 1 a share of trainer.max_steps; 0 for none.
    decay: float = 0.0
    # The cooldown's way down.
    shape: Shape = Shape.linear
    # Factor of optimizer.lr at the end of the cooldown.
    final: float = 0.0


@dataclass
class WsdSchedule(ScheduleConfig):
    """Warm-up, stable, decay (arXiv 2404.06395)."""

    name: str = "wsd"
    # Length of the decay at the end: a number of steps, or below 1 a share of trainer.max_steps.
    decay: float = 0.2
    # The decay's way down.
    shape: Shape = Shape.linear
    # Factor of optimizer.lr at the end.
    final: float = 0.0


@dataclass
class StageConfig:
    """A span of the run with its own learning-rate peak, decay and weight decay."""

    # Share of trainer.max_steps that the stage takes; the stages' shares add up to 1.
    share: float = MISSING
    # Factor of optimizer.lr at the start of the stage.
    lr: float = 1.0
    # Way of the learning rate through the stage.
    shape: Shape = Shape.linear
    # Factor of optimizer.lr that the stage ends with, null for 0; only where the shape is not constant.
    final: float | None = None
    # Factor of optimizer.weight_decay at the start of the stage.
    weight_decay: float = 1.0
    # Way of the weight decay through the stage.
    weight_decay_shape: Shape = Shape.constant
    # Factor of optimizer.weight_decay that the stage ends with, null for 0; only where weight_decay_shape is not
    # constant.
    weight_decay_final: float | None = None


@dataclass
class TwoStageSchedule(ScheduleConfig):
    """Two (or more) stages, as in BitNet b1.58 2B4T (arXiv 2504.12285, on pre-training).

    A weight decay that changes elsewhere than the learning rate has stages of its own: TriLM (arXiv 2407.12327) drops
    the learning rate at 1/2 and the weight decay at 2/3 of a linear decay::

        schedule=two_stage
        schedule.stages=[{share: 0.5, final: 0.5}, {share: 0.5, lr: 0.3125, final: 0.0}]
        weight_decay_schedule=two_stage
        weight_decay_schedule.stages=[{share: 0.6666667, shape: constant}, {share: 0.3333333, lr: 0.0, shape: constant}]
    """

    name: str = "two_stage"
    stages: list[StageConfig] = field(default_factory=list)


SCHEDULE_CONFIGS: dict[str, type[ScheduleConfig]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "polynomial": PolynomialSchedule,
    "exponential": ExponentialSchedule,
    "inverse_sqrt": InverseSqrtSchedule,
    "wsd": WsdSchedule,
    "two_stage": TwoStageSchedule,
}
