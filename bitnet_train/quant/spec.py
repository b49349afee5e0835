"""A frozen description of which linear layer is quantised how."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from bitnet_train.errors import ConfigError
from bitnet_train.quant.config import GradientPrecision, OverrideConfig, QuantConfig, WeightScheme

# How many 2-bit codes a packed byte holds, and so what the rows of a packed matrix must be a multiple of.
CODES_PER_BYTE = 4


@dataclass(frozen=True)
class LayerQuant:
    """How one linear layer is quantised.

    ``scheme`` is a key of :data:`bitnet_train.quant.weights.WEIGHT_QUANTISERS` or ``"float"``; ``groups`` is the number
    of groups of neighbouring output rows that share a scale, or ``"row"``; ``activation_bits`` is 8 or ``None``.
    """

    scheme: str = "ternary"
    threshold: float = 0.5
    groups: int | str = 1
    activation_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.groups != "row" and (isinstance(self.groups, str) or self.groups < 1):
            raise ConfigError(f"quant.weight.groups is {self.groups!r}; use 1, a number of groups, or 'row'.")
        if self.activation_bits not in (None, 8):
            raise ConfigError(f"quant.activation.bits is {self.activation_bits}; use 8, or null for float inputs.")
        if self.scheme != "ternary" and self.threshold != 0.5:
            raise ConfigError(
                f"quant.weight.threshold only acts on ternary weights, not on '{self.scheme}': remove it."
            )
        if self.scheme == "float" and self.groups != 1:
            raise ConfigError("quant.weight.groups has no effect on float weights: remove it or choose another scheme.")
        if self.threshold <= 0:
            raise ConfigError(f"quant.weight.threshold is {self.threshold}; it must be positive (the paper's is 0.5).")

    @property
    def quantised(self) -> bool:
        """Whether the weights are turned into codes at all."""
        return self.scheme != "float"

    def group_count(self, out_features: int) -> int:
        """Number of scales of a layer with ``out_features`` rows. Raises ConfigError when groups do not divide it."""
        groups = out_features if self.groups == "row" else int(self.groups)
        if out_features % groups:
            raise ConfigError(
                f"quant.weight.groups={groups} does not divide the {out_features} output rows of a layer: "
                "choose a divisor of every quantised layer's rows, or 'row'."
            )
        return groups


FLOAT = LayerQuant(scheme="float", activation_bits=None)


@dataclass(frozen=True)
class GradientPolicy:
    """Types of the two gradient matmuls: ``auto``, ``bf16``, ``int8`` or (dX only) ``fp8``.

    What int8 and fp8 mean is in :mod:`bitnet_train.quant.gradients`. ``auto`` depends on the type of the other matmuls
    only, never on the device, so that a run computes the same wherever it is continued.
    """

    dx: str = "auto"
    dw: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("dx", self.dx), ("dw", self.dw)):
            if value not in GradientPrecision.__members__:
                raise ConfigError(f"quant.gradient.{name} is {value!r}; use auto, bf16, int8 or fp8.")
        if self.dw == "fp8":
            raise ConfigError(
                "quant.gradient.dw=fp8 is not supported (8-bit codes of x are not exact in fp8): use int8."
            )

    def resolve(self, compute: str) -> tuple[str, str]:
        """dX and dW without ``auto``, for other matmuls in ``compute``: bf16, fp16, fp32 or fp64."""
        dx = ("int8" if compute in ("bf16", "fp16") else compute) if self.dx == "auto" else self.dx
        return dx, compute if self.dw == "auto" else self.dw


@dataclass(frozen=True)
class QuantSpec:
    """The default quantisation of every linear layer of the blocks, and exceptions by module-name pattern."""

    default: LayerQuant = LayerQuant()
    overrides: tuple[tuple[str, LayerQuant], ...] = ()
    gradient: GradientPolicy = GradientPolicy()

    def for_layer(self, name: str) -> LayerQuant:
        """The quantisation of the layer called ``name``; the last matching override wins."""
        chosen = self.default
        for pattern, layer in self.overrides:
            if fnmatchcase(name, pattern):
                chosen = layer
        return chosen

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Override patterns that match none of ``names``: always a mistake, so callers refuse them."""
        names = list(names)
        return [pattern for pattern, _ in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]

    @property
    def quantised(self) -> bool:
        """Whether any layer can be quantised under this spec."""
        return self.default.quantised or any(layer.quantised for _, layer in self.overrides)


def build_spec(cfg: QuantConfig) -> QuantSpec:
    """The frozen spec of a configuration. Raises ConfigError for combinations that contradict themselves."""
    weight = cfg.weight
    float_weights = weight.scheme is WeightScheme.float
    if float_weights and cfg.activation.bits is not None:
        raise ConfigError(
            f"quant.activation.bits={cfg.activation.bits} with float weights: activations are quantised only at the "
            "input of quantised layers; use quant=none, or set quant.activation.bits=null."
        )
    default = LayerQuant(weight.scheme.value, weight.threshold, weight.groups, cfg.activation.bits)
    gradient = GradientPolicy(cfg.gradient.dx.value, cfg.gradient.dw.value)
    spec = QuantSpec(default, tuple((o.pattern, _overridden(default, o)) for o in cfg.overrides), gradient)
    layers = (default, *(layer for _, layer in spec.overrides))
    if not any(layer.quantised and layer.activation_bits for layer in layers):
        return replace(spec, gradient=replace(gradient, dw="bf16" if gradient.dw == "bf16" else "auto"))
    return spec


def _overridden(default: LayerQuant, override: OverrideConfig) -> LayerQuant:
    scheme = override.scheme.value if override.scheme else default.scheme
    if scheme == "float":
        if override.threshold is not None or override.groups is not None or override.activation_bits:
            raise ConfigError(
                f"quant.overrides: '{override.pattern}' is float, so threshold, groups and activation_bits "
                "do nothing there."
            )
        return FLOAT
    same_scheme = scheme == default.scheme
    return LayerQuant(
        scheme=scheme,
        threshold=override.threshold if override.threshold is not None else (default.threshold if same_scheme else 0.5),
        groups=override.groups if override.groups is not None else (default.groups if default.quantised else 1),
        activation_bits=_bits(override.activation_bits, default),
    )


def _bits(override: int | None, default: LayerQuant) -> int | None:
    if override is not None:
        return override or None
    return default.activation_bits if default.quantised else 8
