"""Rates over the run: the ``schedule`` and ``weight_decay_schedule`` parts of the configuration."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Shape(Enum):
    """The way of a factor over a stage: stays, falls on a line, or falls on half a cosine."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class ScheduleConfig:
    """Base of the learning-rate schedules; every subclass is an option of the ``schedule`` group."""

    name: str = MISSING
    # Steps of linear warm-up from zero: a number of steps, or below 1 a share of trainer.max_steps.
    warmup: float = 0.0


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
    # Factor of optimizer.lr that the stage ends with; only where the shape is not constant.
    final: float | None = None
    # Factor of optimizer.weight_decay at the start of the stage.
    weight_decay: float = 1.0
    # Way of the weight decay through the stage.
    weight_decay_shape: Shape = Shape.constant
    # Factor of optimizer.weight_decay that the stage ends with; only where weight_decay_shape is not constant.
    weight_decay_final: float | None = None


@dataclass
class TwoStageSchedule(ScheduleConfig):
    """Two (or more) stages, as in BitNet b1.58 2B4T (arXiv 2504.12285, section 2.2)."""

    name: str = "two_stage"
    stages: list[StageConfig] = field(default_factory=list)


SCHEDULE_CONFIGS: dict[str, type[ScheduleConfig]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "wsd": WsdSchedule,
    "two_stage": TwoStageSchedule,
}
