"""A frozen description of which linear layer is quantised how."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from bitnet_train.errors import ConfigError
from bitnet_train.quant.config import GradientPrecision, OverrideConfig, QuantConfig, WeightScheme
from bitnet_train.steps import as_steps

# How many 2-bit codes a packed byte holds, and so what the rows of a packed matrix must be a multiple of.
CODES_PER_BYTE = 4


# Codes of a b-bit symmetric weight go from -(2^(b-1) - 1) to that.
SYMMETRIC_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class InputQuant:
    """How the input of a linear layer is quantised: the fields of ``quant.activation``."""

    bits: int | None = 8
    statistic: str = "absmax"
    granularity: str = "token"
    group_size: int | None = None
    top_k: float = 1.0
    hadamard: bool = False

    def __post_init__(self) -> None:
        key = "quant.activation"
        if self.bits is None:
            if replace(self, bits=8) != InputQuant():
                raise ConfigError(f"{key}: statistic, granularity, group_size, top_k and hadamard do nothing to float "
                                  f"inputs ({key}.bits=null): remove them.")  # fmt: skip
            return
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"{key}.bits is {self.bits}; use 2 to 8, or null for float inputs.")
        if self.statistic not in ("absmax", "absmean"):
            raise ConfigError(f"{key}.statistic is {self.statistic}; use absmax or absmean.")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ConfigError(f"{key}.group_size is {self.group_size} with granularity={self.granularity}: "
                              "granularity=group needs it, the others do not take it.")  # fmt: skip
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"{key}.group_size is {self.group_size}; it must be at least 1.")
        if not 0 < self.top_k <= 1:
            raise ConfigError(f"{key}.top_k is {self.top_k:g}; it is a share above 0 and at most 1.")

    @property
    def standard(self) -> bool:
        """Whether it is BitNet b1.58's: 8 bits, the largest magnitude of each token. Fused kernels know no other."""
        return self == InputQuant()

    def check_width(self, name: str, in_features: int) -> None:
        """Raises ConfigError when group_size does not divide the inputs of layer ``name``."""
        if self.hadamard and (in_features & -in_features) > 2**14:
            raise ConfigError(f"{name}: quant.activation.hadamard mixes at most 16,384 channels.")
        if self.group_size is not None and in_features % self.group_size:
            raise ConfigError(
                f"{name}: quant.activation.group_size={self.group_size} does not divide its {in_features} inputs."
            )


EIGHT_BITS = InputQuant()


def input_fields(inputs: InputQuant) -> dict[str, Any]:
    """``inputs`` as fields of :class:`LayerQuant`."""
    return {
        "activation_bits": inputs.bits,
        "activation_statistic": inputs.statistic,
        "activation_granularity": inputs.granularity,
        "activation_group_size": inputs.group_size,
        "top_k": inputs.top_k,
        "hadamard": inputs.hadamard,
    }


@dataclass(frozen=True)
class LayerQuant:
    """How one linear layer is quantised: the fields of ``quant.weight`` and ``quant.activation``.

    ``scheme`` is a key of :data:`bitnet_train.quant.weights.WEIGHT_QUANTISERS` or ``"float"``; ``groups`` is the number
    of groups of neighbouring output rows that share a scale, or ``"row"``, unless ``group_rows`` gives the rows of a
    group; ``bits`` belongs to symmetric weights; ``inputs`` says more about activations than their bits.
    """

    scheme: str = "ternary"
    threshold: float = 0.5
    groups: int | str = 1
    activation_bits: int | None = 8
    bits: int | None = None
    statistic: str = ""
    group_rows: int | None = None
    trainable_scale: bool = False
    activation_statistic: str = "absmax"
    activation_granularity: str = "token"
    activation_group_size: int | None = None
    top_k: float = 1.0
    hadamard: bool = False

    def __post_init__(self) -> None:
        if not self.statistic:
            object.__setattr__(self, "statistic", "absmax" if self.scheme == "symmetric" else "absmean")
        if self.groups != "row" and (isinstance(self.groups, str) or self.groups < 1):
            raise ConfigError(f"quant.weight.groups is {self.groups!r}; use 1, a number of groups, or 'row'.")
        if self.scheme != "ternary" and self.threshold != 0.5:
            raise ConfigError(
                f"quant.weight.threshold only acts on ternary weights, not on '{self.scheme}': remove it."
            )
        if self.group_rows is not None and (self.groups != 1 or self.group_rows < 1):
            raise ConfigError(
                f"quant.weight.group_rows={self.group_rows} must be at least 1 and stands in the place of "
                "quant.weight.groups: leave one of them out."
            )
        if self.scheme == "float":
            if self.groups != 1 or self.group_rows is not None:
                raise ConfigError(
                    "quant.weight.groups has no effect on float weights: remove it or choose another scheme."
                )
            if self.bits is not None or self.trainable_scale or self.statistic != "absmean":
                raise ConfigError(
                    "quant.weight.bits, statistic and trainable_scale have no effect on float weights: remove them."
                )
        if (self.scheme == "symmetric") != (self.bits is not None):
            raise ConfigError(
                "quant.weight.scheme=symmetric needs quant.weight.bits=2, 3, 4 or 8."
                if self.bits is None
                else f"quant.weight.bits={self.bits} belongs to quant.weight.scheme=symmetric, not to {self.scheme}."
            )
        if self.bits is not None and self.bits not in SYMMETRIC_BITS:
            raise ConfigError(f"quant.weight.bits is {self.bits}; use 2, 3, 4 or 8.")
        allowed = ("absmax", "absmean") if self.scheme == "symmetric" else ("absmean", "absmedian")
        if self.statistic not in allowed:
            raise ConfigError(f"quant.weight.statistic={self.statistic} does not go with {self.scheme} weights: use "
                              f"{' or '.join(allowed)}.")  # fmt: skip
        if self.threshold <= 0:
            raise ConfigError(f"quant.weight.threshold is {self.threshold}; it must be positive (the paper's is 0.5).")
        _ = self.inputs  # checked where it is made

    @property
    def inputs(self) -> InputQuant:
        """How the layer's input is quantised."""
        return InputQuant(
            self.activation_bits,
            self.activation_statistic,
            self.activation_granularity,
            self.activation_group_size,
            self.top_k,
            self.hadamard,
        )

    @property
    def quantised(self) -> bool:
        """Whether the weights are turned into codes at all."""
        return self.scheme != "float"

    @property
    def largest_code(self) -> int:
        """The largest magnitude of a weight's code."""
        return 1 if self.bits is None else 2 ** (self.bits - 1) - 1

    def group_count(self, out_features: int) -> int:
        """Number of scales of a layer with ``out_features`` rows. Raises ConfigError when groups do not divide it."""
        if self.group_rows is not None:
            if out_features % self.group_rows:
                raise ConfigError(
                    f"quant.weight.group_rows={self.group_rows} does not divide the {out_features} output rows of a "
                    "layer: choose a divisor of every quantised layer's rows."
                )
            return out_features // self.group_rows
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
class LateInputs:
    """Input settings that hold from a step on: field names of LayerQuant and values."""

    pattern: str
    since: float
    fields: tuple[tuple[str, object], ...]

    def begun(self, step: int, total: int) -> bool:
        """Whether they hold in step ``step`` (from 0) of ``total``."""
        return step >= as_steps(self.since, total)


@dataclass(frozen=True)
class QuantSpec:
    """The default quantisation of every linear layer of the blocks, and exceptions by module-name pattern.

    ``late`` are changes that begin on the way; they count as begun here, for this is what a finished run ships. See
    :meth:`at` for the spec of a step.
    """

    default: LayerQuant = LayerQuant()
    overrides: tuple[tuple[str, LayerQuant], ...] = ()
    gradient: GradientPolicy = GradientPolicy()
    late: tuple[LateInputs, ...] = ()
    # Bits of the stage that a run with falling bits is in; layers of fewer bits have so many for now.
    stage_bits: int | None = None

    def for_layer(self, name: str) -> LayerQuant:
        """The quantisation of the layer called ``name``; the last matching override wins."""
        chosen = self.default
        for pattern, layer in self.overrides:
            if fnmatchcase(name, pattern):
                chosen = layer
        for change in self.late:
            if chosen.quantised and fnmatchcase(name, change.pattern):
                chosen = replace(chosen, **dict(change.fields))  # type: ignore[arg-type]
        if self.stage_bits is not None and chosen.quantised and chosen.largest_code < 2 ** (self.stage_bits - 1) - 1:
            chosen = replace(chosen, scheme="symmetric", bits=self.stage_bits, statistic="", threshold=0.5)
        return chosen

    def at(self, step: int, total: int) -> "QuantSpec":
        """What holds in step ``step`` (from 0) of ``total``."""
        return replace(self, late=tuple(change for change in self.late if change.begun(step, total)))

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Override patterns that match none of ``names``: always a mistake, so callers refuse them."""
        names = list(names)
        patterns = [*(pattern for pattern, _ in self.overrides), *(change.pattern for change in self.late)]
        return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]

    @property
    def quantised(self) -> bool:
        """Whether any layer can be quantised under this spec."""
        return self.default.quantised or any(layer.quantised for _, layer in self.overrides)


def build_spec(cfg: QuantConfig) -> QuantSpec:
    """The frozen spec of a configuration. Raises ConfigError for combinations that contradict themselves."""
    weight, activation = cfg.weight, cfg.activation
    if weight.scheme is WeightScheme.float and activation.bits is not None:
        raise ConfigError(
            f"quant.activation.bits={activation.bits} with float weights: activations are quantised only at the "
            "input of quantised layers; use quant=none, or set quant.activation.bits=null."
        )
    default = LayerQuant(
        weight.scheme.value, weight.threshold, weight.groups, activation.bits, weight.bits, _name(weight.statistic),
        weight.group_rows, weight.trainable_scale, activation.statistic.value, activation.granularity.value,
        activation.group_size, activation.top_k, activation.hadamard,
    )  # fmt: skip
    gradient = GradientPolicy(cfg.gradient.dx.value, cfg.gradient.dw.value)
    overrides = tuple((o.pattern, _overridden(default, o)) for o in cfg.overrides if o.since is None)
    late = tuple(_late(o) for o in cfg.overrides if o.since is not None)
    spec = QuantSpec(default, overrides, gradient, late)
    layers = (default, *(layer for _, layer in spec.overrides))
    if gradient.dx == "fp8" and any(layer.largest_code > 16 for layer in layers):
        raise ConfigError("quant.gradient.dx=fp8 does not hold 8-bit weight codes exactly: use int8 or bf16.")
    if not any(layer.quantised and layer.activation_bits for layer in layers):
        return replace(spec, gradient=replace(gradient, dw="bf16" if gradient.dw == "bf16" else "auto"))
    return spec


def _name(value: Enum | None) -> str:
    return "" if value is None else str(value.value)


# Fields of an override that a float layer does not have.
QUANTISER_FIELDS = tuple(f.name for f in fields(OverrideConfig) if f.name not in ("pattern", "scheme", "since"))
INPUT_FIELDS = tuple(name for name in QUANTISER_FIELDS if name.startswith("activation_") or name in ("top_k",))


def _given(override: OverrideConfig) -> dict[str, object]:
    """What an override sets, as fields of LayerQuant."""
    given = {name: getattr(override, name) for name in QUANTISER_FIELDS if getattr(override, name) is not None}
    return {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}


def _overridden(default: LayerQuant, override: OverrideConfig) -> LayerQuant:
    scheme = override.scheme.value if override.scheme else default.scheme
    given = _given(override)
    if scheme == "float":
        if any(given.values()):
            raise ConfigError(
                f"quant.overrides: '{override.pattern}' is float, so {' and '.join(n for n in given if given[n])} "
                "would do nothing there."
            )
        return FLOAT
    if "activation_bits" in given:
        given["activation_bits"] = given["activation_bits"] or None
        if given["activation_bits"] is None:  # float inputs have no further settings to inherit
            default = replace(default, **input_fields(InputQuant(None)))
    elif not default.quantised:
        given["activation_bits"] = 8
    if "group_rows" in given:
        given.setdefault("groups", 1)
    elif "groups" in given:
        given["group_rows"] = None
    if scheme != default.scheme:
        # Another scheme starts from its own threshold, bits and statistic.
        given = {"threshold": 0.5, "bits": None, "statistic": ""} | given
    try:
        return replace(default, scheme=scheme, **given)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"quant.overrides, '{override.pattern}': {error}") from None


def _late(override: OverrideConfig) -> LateInputs:
    given = _given(override)
    where = f"quant.overrides: '{override.pattern}' since {override.since:g}"
    other = [name for name in ("scheme",) if override.scheme is not None] + [n for n in given if n not in INPUT_FIELDS]
    if other:
        raise ConfigError(f"{where}: {other[0]} cannot change on the way; only activation_* and top_k can.")
    if not given or given.get("activation_bits") == 0:
        raise ConfigError(f"{where}: give the activation_* settings that change then (8 to 2 bits).")
    assert override.since is not None
    if override.since <= 0:
        raise ConfigError(f"{where}: it must be positive: a step, or below 1 a share of trainer.max_steps.")
    return LateInputs(override.pattern, override.since, tuple(given.items()))
