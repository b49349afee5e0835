"""What is quantised and how: the ``quant`` part of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Union

from omegaconf import MISSING


class WeightScheme(Enum):
    """The quantisers of ``bitnet_train.quant.weights``; ``float`` leaves a layer alone."""

    ternary = "ternary"
    binary = "binary"
    symmetric = "symmetric"
    float = "float"


class Statistic(Enum):
    """What a scale is taken from: the mean, the median or the largest of the magnitudes."""

    absmean = "absmean"
    absmedian = "absmedian"
    absmax = "absmax"


class Granularity(Enum):
    """What shares an activation scale: a token's inputs, a group of a token's channels, or the whole batch."""

    token = "token"
    group = "group"
    tensor = "tensor"


@dataclass
class WeightQuantConfig:
    # Codes that the weights of a linear layer become: ternary {-1, 0, 1}, binary {-1, 1}, symmetric (whole numbers of
    # `bits` bits), or float (not quantised).
    scheme: WeightScheme = WeightScheme.ternary
    # Symmetric only, and needed there: 2 (-1 to 1), 3 (-3 to 3), 4 (-7 to 7) or 8 (-127 to 127).
    bits: int | None = None
    # What the scale is: absmean (BitNet b1.58), absmedian (b1.58 Reloaded, arXiv 2407.09527) or, for symmetric only,
    # absmax; null for the scheme's own: absmax for symmetric, absmean for the others.
    statistic: Statistic | None = None
    # Ternary only: a weight becomes 0 when |w| <= threshold * scale. BitNet b1.58 rounds to nearest, which is 0.5.
    threshold: float = 0.5
    # How many groups of neighbouring output rows have a scale of their own: 1 (one scale per tensor), G, or "row".
    groups: Union[int, str] = 1  # noqa: UP007  (OmegaConf 2.3 reads typing.Union only)
    # Rows (output channels) per group instead of the number of groups, for example 4 or 8; null uses groups.
    group_rows: int | None = None
    # Learn the scales: they start at the statistic and receive LSQ's gradient (arXiv 1902.08153).
    trainable_scale: bool = False


@dataclass
class ActivationQuantConfig:
    # Bits of the inputs of quantised layers: 2 to 8, or null for inputs that stay floats.
    bits: int | None = 8
    # What the scale is taken from: absmax (BitNet b1.58), or absmean for few bits (BitNet a4.8, arXiv 2411.04965).
    statistic: Statistic = Statistic.absmax
    # token: one scale per token. group: one per group_size channels of a token. tensor: one for all tokens of a batch,
    # so that a token's result depends on its neighbours.
    granularity: Granularity = Granularity.token
    # Channels per scale, with granularity=group; divides the inputs of every quantised layer.
    group_size: int | None = None
    # Share of a token's inputs, the largest magnitudes, that are kept; the others become 0 (a4.8 keeps 0.5 for o_proj).
    top_k: float = 1.0
    # Rotate the inputs by a Hadamard matrix before they are quantised (BitNet v2, arXiv 2504.18415: o_proj, down_proj).
    hadamard: bool = False


class GradientPrecision(Enum):
    """The type that one operand of a gradient matmul is rounded to."""

    auto = "auto"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


@dataclass
class GradientConfig:
    # dX = dY @ W: bf16; int8 or fp8 with one scale per token of dY; or auto: int8 in runs with 16-bit matmuls, else
    # the run's own type.
    dx: GradientPrecision = GradientPrecision.auto
    # dW = dY.T @ X: bf16; int8 with one scale per output and block of 128 tokens of dY; or auto: the run's own type,
    # which is also what int8 comes to for layers whose inputs stay floats (quant.activation.bits=null) or have a scale
    # per group.
    dw: GradientPrecision = GradientPrecision.auto


@dataclass
class OverrideConfig:
    # Module-name pattern with * and ?, for example "layers.*.self_attn.o_proj" or "layers.0.*"; the last match wins.
    pattern: str = MISSING
    # Fields left at null keep the value of quant.weight and quant.activation.
    scheme: WeightScheme | None = None
    bits: int | None = None
    statistic: Statistic | None = None
    threshold: float | None = None
    groups: Union[int, str, None] = None  # noqa: UP007
    group_rows: int | None = None
    trainable_scale: bool | None = None
    # 2 to 8, or 0 for inputs that stay floats.
    activation_bits: int | None = None
    # As in quant.activation, which they stand for there.
    activation_statistic: Statistic | None = None
    activation_granularity: Granularity | None = None
    activation_group_size: int | None = None
    top_k: float | None = None
    hadamard: bool | None = None
    # From when on it holds: a step, or below 1 a share of trainer.max_steps; null from the start. One that begins later
    # changes what the earlier ones left, in the order of the list (a4.8 and v2 go to 4-bit inputs late in the run). It
    # sets activation_* and top_k only: nothing that would change the meaning of the trained weights.
    since: float | None = None


# ---------------------------------------------------------------- progressive quantisation


class Ramp(Enum):
    """The way of the quantiser's strength from 0 to 1: a line, half a cosine, or 1 - exp(-5 t) scaled to end at 1."""

    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"


class BlockOrder(Enum):
    """Which block is quantised first."""

    first_to_last = "first_to_last"
    last_to_first = "last_to_first"
    outside_in = "outside_in"


@dataclass
class ProgressiveConfig:
    """Base of the ways from float to quantised; every subclass is an option of the ``quant/progressive`` group.

    Validation on the way measures the model as it computes at that step, not what it would be once quantised.
    """

    name: str = MISSING


@dataclass
class NotProgressive(ProgressiveConfig):
    """Quantised from the first step on."""

    name: str = "none"


@dataclass
class LambdaProgressive(ProgressiveConfig):
    """``w + lambda * (q(w) - w)``, and the same for the inputs, with lambda from 0 to 1 (the Llama3-8B-1.58 recipe)."""

    name: str = "lambda"
    # When lambda reaches 1: a step, or below 1 a share of trainer.max_steps.
    until: float = 0.2
    # The way of lambda.
    shape: Ramp = Ramp.linear


@dataclass
class SwitchProgressive(ProgressiveConfig):
    """Float first, then quantised at once (16 to 1.58 bits, arXiv 2502.11895)."""

    name: str = "switch"
    # When: a step, or below 1 a share of trainer.max_steps.
    at: float = 0.2


@dataclass
class LayerwiseProgressive(ProgressiveConfig):
    """One block after the other, at equal distances."""

    name: str = "layerwise"
    # When the last block is quantised: a step, or below 1 a share of trainer.max_steps.
    until: float = 0.5
    # Which block comes first.
    order: BlockOrder = BlockOrder.first_to_last


@dataclass
class BitStage:
    # Bits of the weights in this stage: 3, 4 or 8, symmetric with the scale of the largest magnitude. Layers that keep
    # more in the end have theirs all along.
    bits: int = MISSING
    # When the stage ends: a step, or below 1 a share of trainer.max_steps.
    until: float = MISSING


@dataclass
class BitsProgressive(ProgressiveConfig):
    """Fewer and fewer bits: the stages one after the other, then what quant.weight says."""

    name: str = "bits"
    # The stages in order: bits of the weights, and when the stage ends.
    stages: list[BitStage] = field(default_factory=lambda: [BitStage(8, 0.1), BitStage(4, 0.2)])


@dataclass
class NoiseProgressive(ProgressiveConfig):
    """Quant-Noise (arXiv 2004.07320): a random share of the weights is quantised, another one in each step."""

    name: str = "noise"
    # Share of the weights that is quantised.
    rate: float = 0.5
    # When all of them are from then on: a step, or below 1 a share of trainer.max_steps.
    until: float = 0.9


PROGRESSIVE_CONFIGS: dict[str, type[ProgressiveConfig]] = {
    "none": NotProgressive,
    "lambda": LambdaProgressive,
    "switch": SwitchProgressive,
    "layerwise": LayerwiseProgressive,
    "bits": BitsProgressive,
    "noise": NoiseProgressive,
}


@dataclass
class QuantConfig:
    # The weights of the blocks' linear layers.
    weight: WeightQuantConfig = field(default_factory=WeightQuantConfig)
    # The inputs of the quantised ones.
    activation: ActivationQuantConfig = field(default_factory=ActivationQuantConfig)
    # Precision of the two gradient matmuls of every quantised layer (float layers, as in quant=none, never use it).
    gradient: GradientConfig = field(default_factory=GradientConfig)
    # Exceptions by module name, for layers that stay float or use another scheme.
    overrides: list[OverrideConfig] = field(default_factory=list)
    # The way from float weights to quantised ones over the run.
    progressive: ProgressiveConfig = field(default_factory=NotProgressive)
