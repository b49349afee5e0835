"""Progressive quantisation: how far a run is on the way from float to quantised, as a pure function of the step."""

import math
from dataclasses import dataclass, replace

from bitnet_train.errors import ConfigError
from bitnet_train.quant.config import (
    BitsProgressive,
    BlockOrder,
    LambdaProgressive,
    LayerwiseProgressive,
    NoiseProgressive,
    NotProgressive,
    ProgressiveConfig,
    Ramp,
    SwitchProgressive,
)
from bitnet_train.quant.spec import SYMMETRIC_BITS, QuantSpec
from bitnet_train.steps import as_steps

# exp(-5) is below 1 %: the exponential ramp is all but level at its end.
STEEPNESS = 5.0


@dataclass(frozen=True)
class QuantState:
    """What is quantised how, and how strongly, in one step.

    ``strengths`` has a number per block, 0 (float) to 1 (quantised), or is None when all of them are 1 from now on:
    then the forward multiplies integers. ``noise`` is the share of the weights that are quantised, drawn anew in each
    step, or None.
    """

    spec: QuantSpec
    strengths: tuple[float, ...] | None = None
    noise: float | None = None

    @property
    def complete(self) -> bool:
        """Whether the forward is that of the finished model's kind: integers only."""
        return self.strengths is None and self.noise is None


def quant_state(cfg: ProgressiveConfig, spec: QuantSpec, step: int, total: int, blocks: int) -> QuantState:
    """The state in step ``step`` (from 0) of a run of ``total`` steps with ``blocks`` blocks."""
    now = spec.at(step, total)
    if isinstance(cfg, LambdaProgressive):
        end = as_steps(cfg.until, total)
        return QuantState(now, None if step >= end else (ramp(cfg.shape, step / end),) * blocks)
    if isinstance(cfg, SwitchProgressive):
        return QuantState(now, None if step >= as_steps(cfg.at, total) else (0.0,) * blocks)
    if isinstance(cfg, LayerwiseProgressive):
        end = as_steps(cfg.until, total)
        if step >= end:
            return QuantState(now)
        done = 1 + step * (blocks - 1) // end if blocks > 1 else 0
        first = set(block_order(cfg.order, blocks)[:done])
        return QuantState(now, tuple(1.0 if block in first else 0.0 for block in range(blocks)))
    if isinstance(cfg, BitsProgressive):
        stage = next((stage for stage in cfg.stages if step < as_steps(stage.until, total)), None)
        return QuantState(now if stage is None else replace(now, stage_bits=stage.bits))
    if isinstance(cfg, NoiseProgressive):
        return QuantState(now, noise=cfg.rate if step < as_steps(cfg.until, total) else None)
    return QuantState(now)


def finished_spec(cfg: ProgressiveConfig, spec: QuantSpec, done: int, total: int, blocks: int, where: str) -> QuantSpec:
    """What the last of ``done`` steps computed with.

    Raises ConfigError, which names ``where``, while the weights are still on their way to codes.
    """
    state = quant_state(cfg, spec, max(0, done - 1), max(1, total), blocks)
    if not state.complete:
        raise ConfigError(
            f"{where} is of step {done}, where the weights are still on their way to codes "
            f"(quant.progressive={cfg.name}): train the run to its end, or take a later step."
        )
    return state.spec


def moved_back(cfg: ProgressiveConfig, spec: QuantSpec, done: int, before: int, total: int, blocks: int) -> str | None:
    """What to say when a run of ``before`` steps goes on after ``done`` of them as one of ``total``, and borders that
    are shares of the run have moved, so that the next steps are quantised otherwise than they would have been."""
    last, planned = min(done, before - 1), QuantState(spec)
    if last >= 0:
        planned = quant_state(cfg, spec, last, before, blocks)
    now = quant_state(cfg, spec, done, total, blocks)
    if planned == now or done >= total:
        return None
    ready = next((s for s in range(done, total) if quant_state(cfg, spec, s, total, blocks) == planned), total)
    return (
        f"trainer.max_steps went from {before} to {total}, and borders in quant.progressive or quant.overrides that "
        f"are shares of the run moved with it: steps {done + 1} to {ready} are quantised otherwise than the last ones "
        "were; to keep the borders, give them as steps."
    )


def ramp(shape: Ramp, progress: float) -> float:
    """From 0 at progress 0 to 1 at progress 1."""
    if shape is Ramp.linear:
        return progress
    if shape is Ramp.cosine:
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return (1.0 - math.exp(-STEEPNESS * progress)) / (1.0 - math.exp(-STEEPNESS))


def block_order(order: BlockOrder, blocks: int) -> list[int]:
    """Block numbers in the order in which they are quantised."""
    numbers = list(range(blocks))
    if order is BlockOrder.last_to_first:
        return numbers[::-1]
    if order is BlockOrder.outside_in:
        return sorted(numbers, key=lambda block: (min(block, blocks - 1 - block), block))
    return numbers


def check_progressive(cfg: ProgressiveConfig, spec: QuantSpec, total: int) -> None:
    """Raises ConfigError for a way that does not end within the run of ``total`` steps or contradicts the spec."""
    key = f"quant.progressive={cfg.name}"
    for change in spec.late:
        since = as_steps(change.since, total, f"quant.overrides: since of '{change.pattern}'")
        if not 0 < since < total:
            raise ConfigError(
                f"quant.overrides: '{change.pattern}' since {change.since:g} is step {since}, "
                f"which must lie within the run of trainer.max_steps={total}."
            )
    if isinstance(cfg, NotProgressive):
        return
    if not spec.quantised:
        raise ConfigError(f"{key} has nothing to quantise with quant=none: choose quant/progressive=none.")
    if isinstance(cfg, BitsProgressive):
        _check_stages(cfg, spec, total)
        return
    name = "at" if isinstance(cfg, SwitchProgressive) else "until"
    value: float = getattr(cfg, name)
    step = as_steps(value, total, f"quant.progressive.{name}")
    if not 0 < step < total:
        raise ConfigError(
            f"quant.progressive.{name}={value:g} is step {step}, which must lie within the run of "
            f"trainer.max_steps={total}, so that what is trained last is what ships."
        )
    if isinstance(cfg, NoiseProgressive) and not 0 < cfg.rate < 1:
        raise ConfigError(f"quant.progressive.rate is {cfg.rate:g}; it is a share between 0 and 1.")


def _check_stages(cfg: BitsProgressive, spec: QuantSpec, total: int) -> None:
    if not cfg.stages:
        raise ConfigError("quant.progressive.stages is empty: give at least one, for example {bits: 8, until: 0.1}.")
    ends = [as_steps(stage.until, total, "until of quant.progressive.stages") for stage in cfg.stages]
    if any(stage.bits not in SYMMETRIC_BITS for stage in cfg.stages):
        raise ConfigError("quant.progressive.stages: bits must be 3, 4 or 8.")
    if ends != sorted(set(ends)) or not ends[0] > 0 or ends[-1] >= total:
        raise ConfigError(
            f"quant.progressive.stages end at steps {', '.join(map(str, ends))}, which must grow and lie within the "
            f"run of trainer.max_steps={total}."
        )
    bits = [stage.bits for stage in cfg.stages]
    if bits != sorted(set(bits), reverse=True):
        raise ConfigError(
            f"quant.progressive.stages have {', '.join(map(str, bits))} bits, which must fall from stage to stage."
        )
    layers = [layer for layer in (spec.default, *(layer for _, layer in spec.overrides)) if layer.quantised]
    for stage in cfg.stages:
        if all(layer.largest_code >= 2 ** (stage.bits - 1) - 1 for layer in layers):
            raise ConfigError(
                f"quant.progressive.stages: a stage of {stage.bits} bits changes nothing, for no layer has fewer "
                "in the end: leave it out."
            )
    if spec.gradient.dx == "fp8" and any(stage.bits == 8 for stage in cfg.stages):
        raise ConfigError(
            "quant.gradient.dx=fp8 does not hold the 8-bit weight codes of quant.progressive.stages exactly: use int8 "
            "or bf16."
        )
    if any(layer.trainable_scale for layer in layers):
        raise ConfigError(
            "quant.progressive=bits changes the meaning of a scale from stage to stage, which a learned one cannot "
            "follow: set quant.weight.trainable_scale=false."
        )
