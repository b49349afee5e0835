"""What is quantised and how: the ``quant`` part of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Union

from omegaconf import MISSING


class WeightScheme(Enum):
    """The quantisers of ``bitnet_train.quant.weights``; ``float`` leaves a layer alone."""

    ternary = "ternary"
    binary = "binary"
    float = "float"


@dataclass
class WeightQuantConfig:
    # Codes that the weights of a linear layer become: ternary {-1, 0, 1}, binary {-1, 1}, or float (not quantised).
    scheme: WeightScheme = WeightScheme.ternary
    # Ternary only: a weight becomes 0 when |w| <= threshold * mean|W|. BitNet b1.58 rounds to nearest, which is 0.5.
    threshold: float = 0.5
    # How many groups of neighbouring output rows have a scale of their own: 1 (one scale per tensor), G, or "row".
    groups: Union[int, str] = 1  # noqa: UP007  (OmegaConf 2.3 reads typing.Union only)


@dataclass
class ActivationQuantConfig:
    # Bits of the inputs of quantised layers, one scale per token: 8, or null for inputs that stay floats.
    bits: int | None = 8


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
    # which is also what int8 comes to for layers whose inputs stay floats (quant.activation.bits=null).
    dw: GradientPrecision = GradientPrecision.auto


@dataclass
class OverrideConfig:
    # Module-name pattern with * and ?, for example "layers.*.self_attn.o_proj" or "layers.0.*"; the last match wins.
    pattern: str = MISSING
    # Fields left at null keep the value of quant.weight and quant.activation.
    scheme: WeightScheme | None = None
    threshold: float | None = None
    groups: Union[int, str, None] = None  # noqa: UP007
    # 8, or 0 for inputs that stay floats.
    activation_bits: int | None = None


@dataclass
class QuantConfig:
    weight: WeightQuantConfig = field(default_factory=WeightQuantConfig)
    activation: ActivationQuantConfig = field(default_factory=ActivationQuantConfig)
    # Precision of the two gradient matmuls of every quantised layer (float layers, as in quant=none, never use it).
    gradient: GradientConfig = field(default_factory=GradientConfig)
    # Exceptions by module name, for layers that stay float or use another scheme.
    overrides: list[OverrideConfig] = field(default_factory=list)
