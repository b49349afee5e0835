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

from bitnet_train.kernels.backend import Backend
from bitnet_train.kernels.op import bit_linear, compute_dtype
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import rms_norm
from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import Codes, quantise_weight


class BitLinear(nn.Linear):
    """A drop-in for ``nn.Linear`` with quantised weights and 8-bit inputs.

    The parameters are those of ``nn.Linear``: ``weight`` (out, in) is the master weight that the optimizer updates,
    ``bias`` (out,) is added after dequantisation. x (..., in), of any float type -> (..., out) in the autocast type, or
    the type of the weights without autocast.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        quant: scheme, threshold, groups and activation bits; ternary, one scale per tensor, 8 bits by default.
        backend: kernel backend; chosen by device when None.
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
    ) -> None:
        if not quant.quantised:
            raise ValueError("BitLinear needs a quantised scheme; use nn.Linear for float layers")
        quant.group_count(out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.quant = quant
        self.backend = backend
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
        return self.kept or quantise_weight(self.weight, self.quant)

    def forward(self, x: Tensor) -> Tensor:
        return shared_input_forward(x, [self], None, self.backend)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant}"


def shared_input_forward(
    x: Tensor,
    layers: Sequence[nn.Linear],
    norm: RMSNorm | None,
    backend: Backend | None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The outputs of ``layers`` for one input x (..., K), normed and quantised once.

    ``kept`` holds stacked codes int8 (N, K) and row scales (N,) of the BitLinear layers among ``layers``; they are
    derived here when it is None. Layers of different activation bits are separate calls; nn.Linear layers stay float.
    """
    norm_weight, norm_eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    outputs: dict[int, Tensor] = {}
    for bits in dict.fromkeys(layer.quant.activation_bits for layer in layers if isinstance(layer, BitLinear)):
        group = [layer for layer in layers if isinstance(layer, BitLinear) and layer.quant.activation_bits == bits]
        codes, row_scale = kept if kept is not None else stack_codes(group)
        y = bit_linear(
            x, codes, row_scale, [layer.weight for layer in group],
            norm_weight=norm_weight, norm_eps=norm_eps, activation_bits=bits, backend=backend,
            out_dtype=compute_dtype(group[0].weight),
        )  # fmt: skip
        parts = torch.split(y, [layer.out_features for layer in group], dim=-1) if len(group) > 1 else (y,)
        for layer, part in zip(group, parts, strict=True):
            outputs[id(layer)] = part if layer.bias is None else part + layer.bias.to(part.dtype)
    floats = [layer for layer in layers if not isinstance(layer, BitLinear)]
    if floats:
        # Normed and cast once however many layers read it: the dense twin deserves that as well.
        normed = (x if norm is None else rms_norm(x, norm.weight, norm.eps)[0]).to(compute_dtype(floats[0].weight))
        outputs |= {id(layer): F.linear(normed, layer.weight, layer.bias) for layer in floats}
    return [outputs[id(layer)] for layer in layers]


def stack_codes(layers: Sequence[BitLinear]) -> tuple[Tensor, Tensor]:
    """Codes int8 (N, K) and row scales float32 (N,) of ``layers``, stacked along the rows."""
    quantised = [layer.quantised() for layer in layers]
    if len(quantised) == 1:
        return quantised[0].codes, quantised[0].row_scale()
    return torch.cat([q.codes for q in quantised]), torch.cat([q.row_scale() for q in quantised])


class SharedInput(nn.Module):
    """Linear layers that read the same input: q, k and v; gate and up; or a single one behind its norm.

    It owns no parameters. The layers and the norm stay where their checkpoint names say; this module only refers to
    them, and keeps the stacked codes when a :class:`CodeCache` asks it to.
    """

    def __init__(self, layers: Sequence[nn.Linear], norm: RMSNorm | None, backend: Backend | None = None) -> None:
        super().__init__()
        # A tuple is not registered as submodules, so the parameters keep their one name in the state dict.
        self.layers = tuple(layers)
        self.norm_ref = (norm,)
        self.backend = backend
        self.codes: Tensor | None
        self.row_scale: Tensor | None
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("row_scale", None, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": {"codes": None, "row_scale": None}}  # derived again, as in BitLinear

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        row_scale = self.row_scale
        super()._apply(fn, recurse)
        if row_scale is not None and self.codes is not None:
            self.row_scale = row_scale.to(self.codes.device)
        return self

    @property
    def bit_layers(self) -> list[BitLinear]:
        """The quantised ones among the layers."""
        return [layer for layer in self.layers if isinstance(layer, BitLinear)]

    @property
    def stackable(self) -> bool:
        """Whether the quantised layers can be one matmul: they exist and agree on the activation bits."""
        return len({layer.quant.activation_bits for layer in self.bit_layers}) == 1

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = (self.codes, self.row_scale) if self.codes is not None and self.row_scale is not None else None
        return shared_input_forward(x, self.layers, self.norm_ref[0], self.backend, kept)


def wide_enough(gate: Tensor, activation: str) -> None:
    """Raises ValueError when squared ReLU of ``gate`` would overflow its float16."""
    if activation == "relu2" and gate.dtype is torch.float16:
        raise ValueError("squared ReLU overflows float16: run this model in bfloat16 or float32")
