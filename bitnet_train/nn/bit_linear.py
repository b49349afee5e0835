"""BitLinear: a linear layer whose forward multiplies integers, and the sharing of one quantised input by several.

Codes are *derived* from the master weights. A layer used on its own derives them in every forward, so that no edit of
the weights can leave them stale. :class:`bitnet_train.nn.code_cache.CodeCache` switches a model to keeping them as
buffers that are refreshed once per optimizer step, which is how training and generation run.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.kernels.backend import Backend, WeightCodes, choose_backend
from bitnet_train.kernels.gating import gated
from bitnet_train.kernels.op import compute_dtype, shared_bit_linear
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import residual_sum, rms_norm
from bitnet_train.quant.packing import unpack_quarters
from bitnet_train.quant.spec import GradientPolicy, LayerQuant
from bitnet_train.quant.weights import Codes


class BitLinear(nn.Linear):
    """A drop-in for ``nn.Linear`` with quantised weights and 8-bit inputs.

    The parameters are those of ``nn.Linear``: ``weight`` (out, in) is the master weight that the optimizer updates,
    ``bias`` (out,) is added after dequantisation. x (..., in), of any float type -> (..., out) in the autocast type, or
    the type of the weights without autocast.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        quant: scheme, threshold, groups and activation bits; ternary, one scale per tensor, 8 bits by default.
        backend: kernel backend; chosen by device when None.
        gradient: precision of the gradient matmuls.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        quant: LayerQuant = LayerQuant(),  # noqa: B008  (frozen)
        backend: Backend | None = None,
        gradient: GradientPolicy = GradientPolicy(),  # noqa: B008
    ) -> None:
        if not quant.quantised:
            raise ValueError("BitLinear needs a quantised scheme; use nn.Linear for float layers")
        quant.group_count(out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.quant = quant
        self.backend = backend
        self.gradient = gradient
        self.codes: Tensor | None
        self.scale: Tensor | None
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    @property
    def kept(self) -> Codes | None:
        """The codes and scale held as buffers, or None while they are derived in every forward."""
        return None if self.codes is None or self.scale is None else Codes(self.codes, self.scale)

    def keep(self, kept: Codes | None) -> None:
        """Hold these codes as buffers from now on (None: derive them again). The caller keeps them fresh."""
        self.codes, self.scale = (None, None) if kept is None else kept

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle derives its codes again: no cache refreshes them there. Codes without weights go along.
        return self.__dict__ | {"_buffers": {"codes": None, "scale": None}} if self.weight.numel() else self.__dict__

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.codes is not None:
            self.scale = scale.to(self.codes.device)  # scales are float32 whatever the type of the weights
        return self

    def quantised(self) -> Codes:
        """Codes int8 (out, in) and scale float32 (groups,): the kept ones, or derived from ``weight`` now."""
        if self.codes is not None and self.codes.dtype is torch.uint8 and self.scale is not None:
            return Codes(unpack_quarters(self.codes, self.in_features), self.scale)
        return self.kept or self.choose_backend(self.weight.device).quantise_weight(self.weight, self.quant)

    def choose_backend(self, device: torch.device) -> Backend:
        """The given backend, or the automatic choice for ``device``."""
        return self.backend or choose_backend(device).backend

    def forward(self, x: Tensor) -> Tensor:
        return shared_input_forward(x, None, [self], None)[0][0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant}"


def shared_input_forward(
    x: Tensor,
    delta: Tensor | None,
    layers: Sequence[nn.Linear],
    norm: RMSNorm | None,
    kept: WeightCodes | None = None,
    gate: Tensor | None = None,
    activation: str = "",
) -> tuple[list[Tensor], Tensor]:
    """The outputs of ``layers`` for one input ``x + delta`` (..., K), normed and quantised once; and that sum.

    ``kept`` holds the stacked codes (N, K) of the BitLinear layers among ``layers``; they are derived here when it is
    None. With ``gate`` the input is ``activation(gate) * x``. Layers of different activation bits are separate calls;
    nn.Linear layers stay float.
    """
    norm_weight, norm_eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    outputs: dict[int, Tensor] = {}
    for bits in dict.fromkeys(layer.quant.activation_bits for layer in layers if isinstance(layer, BitLinear)):
        group = [layer for layer in layers if isinstance(layer, BitLinear) and layer.quant.activation_bits == bits]
        weights = kept if kept is not None else stack_codes(group)
        parts, x = shared_bit_linear(
            x, delta, weights, [layer.weight for layer in group], rows=[layer.out_features for layer in group],
            gate=gate, activation=activation, bias=_stack_biases(group), norm_weight=norm_weight, norm_eps=norm_eps,
            activation_bits=bits, out_dtype=compute_dtype(group[0].weight), backend=group[0].backend,
            gradient=group[0].gradient,
        )  # fmt: skip
        delta = None
        outputs |= {id(layer): part for layer, part in zip(group, parts, strict=True)}
    x = residual_sum(x, delta)
    floats = [layer for layer in layers if not isinstance(layer, BitLinear)]
    if floats:
        read = x if gate is None else gated(gate, x, activation)
        # Normed and cast once however many layers read it: the dense twin deserves that as well.
        normed = read if norm is None else rms_norm(read, norm.weight, norm.eps)[0]
        normed = normed.to(compute_dtype(floats[0].weight))
        outputs |= {id(layer): F.linear(normed, layer.weight, layer.bias) for layer in floats}
    return [outputs[id(layer)] for layer in layers], x


def stack_codes(layers: Sequence[BitLinear]) -> WeightCodes:
    """Codes int8 (N, K) and row scales float32 (N,) of ``layers``, stacked along the rows."""
    quantised = [layer.quantised() for layer in layers]
    if len(quantised) == 1:
        return WeightCodes(quantised[0].codes, quantised[0].row_scale())
    return WeightCodes(torch.cat([q.codes for q in quantised]), torch.cat([q.row_scale() for q in quantised]))


def _stack_biases(layers: Sequence[BitLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    absent = layers[0].weight.new_zeros
    return torch.cat([absent(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


class SharedInput(nn.Module):
    """Linear layers that read the same input: q, k and v; gate and up; or a single one behind its norm.

    It owns no parameters. The layers and the norm stay where their checkpoint names say; this module only refers to
    them, and keeps the stacked codes when a :class:`CodeCache` asks it to.
    """

    def __init__(self, layers: Sequence[nn.Linear], norm: RMSNorm | None) -> None:
        super().__init__()
        # A tuple is not registered as submodules, so the parameters keep their one name in the state dict.
        self.layers = tuple(layers)
        self.norm_ref = (norm,)
        self.codes: Tensor | None
        self.row_scale: Tensor | None
        self.backward_codes: Tensor | None
        for name in self._derived:
            self.register_buffer(name, None, persistent=False)

    _derived = ("codes", "row_scale", "backward_codes")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": dict.fromkeys(self._derived)}  # derived again, as in BitLinear

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        row_scale, backward = self.row_scale, self.backward_codes
        super()._apply(fn, recurse)
        if row_scale is not None and self.codes is not None:
            self.row_scale = row_scale.to(self.codes.device)
            self.backward_codes = None if backward is None else backward.to(self.codes.device)  # may be float8
        return self

    @property
    def bit_layers(self) -> list[BitLinear]:
        """The quantised ones among the layers."""
        return [layer for layer in self.layers if isinstance(layer, BitLinear)]

    @property
    def stackable(self) -> bool:
        """Whether the quantised layers can be one matmul: they exist and agree on the activation bits."""
        return len({layer.quant.activation_bits for layer in self.bit_layers}) == 1

    @property
    def kept(self) -> WeightCodes | None:
        """The stacked codes held as buffers, or None while they are derived in every forward."""
        if self.codes is None or self.row_scale is None:
            return None
        return WeightCodes(self.codes, self.row_scale, self.backward_codes)

    def keep(self, kept: WeightCodes | None) -> None:
        """Hold these stacked codes as buffers from now on (None: derive them again). The caller keeps them fresh."""
        self.codes, self.row_scale, self.backward_codes = (None, None, None) if kept is None else kept

    def forward(
        self, x: Tensor, delta: Tensor | None = None, gate: Tensor | None = None, activation: str = ""
    ) -> tuple[list[Tensor], Tensor]:
        """The layers' outputs for ``x + delta`` (..., K) or ``activation(gate) * x``, and the sum in the type of x."""
        return shared_input_forward(x, delta, self.layers, self.norm_ref[0], self.kept, gate, activation)


def wide_enough(gate: Tensor, activation: str) -> None:
    """Raises ValueError when squared ReLU of ``gate`` would overflow its float16."""
    if activation == "relu2" and gate.dtype is torch.float16:
        raise ValueError("squared ReLU overflows float16: run this model in bfloat16 or float32")
