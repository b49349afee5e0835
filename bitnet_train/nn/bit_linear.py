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
from bitnet_train.nn.blending import blended_inputs, blended_weights
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import residual_sum, rms_norm
from bitnet_train.quant.packing import unpack_quarters
from bitnet_train.quant.spec import GradientPolicy, InputQuant, LayerQuant
from bitnet_train.quant.weights import Codes, statistic_scale


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
        # A learned scale starts at the statistic of the weights; see nn.init.
        self.weight_scale: nn.Parameter | None = None
        # Where master weights are sharded: what receives the gradient in the place of ``weight`` (nn.sharded_codes).
        self.stand_in: Tensor | None = None
        if quant.trainable_scale:
            groups = quant.group_count(out_features)
            self.weight_scale = nn.Parameter(torch.empty(groups, device=device, dtype=torch.float32))
            self.reset_scale()
        self.codes: Tensor | None
        self.scale: Tensor | None
        self.weight_blend: Tensor | None
        self.input_blend: Tensor | None
        for name in ("codes", "scale", "weight_blend", "input_blend"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Set a learned scale to the statistic of the weights."""
        if self.weight_scale is not None:
            self.weight_scale.copy_(statistic_scale(self.weight, self.quant))

    def blend(self, weights: Tensor | None, inputs: Tensor | None) -> None:
        """Compute with ``w + weights * (q(w) - w)``, and the same for the inputs, until it is called with None.

        ``weights`` is a number (a 0-d float32 tensor) or a mask (out, in), ``inputs`` a number; 0 is the plain linear
        layer, 1 gives what integers would, up to the rounding of the matmul's type. The tensors are kept, not copied:
        edit them in place, so that compiled code goes on.
        """
        self.weight_blend, self.input_blend = weights, inputs

    @property
    def master(self) -> Tensor:
        """What receives the gradient of the weights (out, in): the master weight, or its stand-in."""
        return self.weight if self.stand_in is None else self.stand_in

    @property
    def kept(self) -> Codes | None:
        """The codes and scale held as buffers, or None while they are derived in every forward."""
        return None if self.codes is None or self.scale is None else Codes(self.codes, self.scale)

    def keep(self, kept: Codes | None) -> None:
        """Hold these codes as buffers from now on (None: derive them again). The caller keeps them fresh."""
        self.codes, self.scale = (None, None) if kept is None else kept

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle derives its codes again: no cache refreshes them there. Codes without weights go along.
        if not self.weight.numel():
            return self.__dict__
        return self.__dict__ | {"_buffers": self._buffers | {"codes": None, "scale": None}}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scale, blends = self.scale, (self.weight_blend, self.input_blend)
        learned = None if self.weight_scale is None else self.weight_scale.data
        super()._apply(fn, recurse)
        # Scales and strengths are float32 whatever the type of the weights.
        if scale is not None and self.codes is not None:
            self.scale = scale.to(self.codes.device)
        if learned is not None and self.weight_scale is not None and self.weight_scale.dtype is not learned.dtype:
            self.weight_scale.data = learned.to(self.weight_scale.device)
        self.blend(*(None if blend is None else blend.to(self.weight.device) for blend in blends))
        return self

    def quantised(self) -> Codes:
        """Codes int8 (out, in) and scale float32 (groups,): the kept ones, or derived from ``weight`` now."""
        if self.codes is not None and self.codes.dtype is torch.uint8 and self.scale is not None:
            return Codes(unpack_quarters(self.codes, self.in_features), self.scale)
        if (kept := self.kept) is not None:
            return kept
        kernels = self.choose_backend(self.weight.device)
        return kernels.quantise_weight(self.weight, self.quant, scale=self.weight_scale)

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
    None. With ``gate`` the input is ``activation(gate) * x``. Layers whose inputs are quantised differently are
    separate calls; nn.Linear layers stay float, and so do BitLinear layers that blend (:meth:`BitLinear.blend`).
    """
    norm_weight, norm_eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    outputs: dict[int, Tensor] = {}
    whole = [layer for layer in layers if isinstance(layer, BitLinear) and layer.weight_blend is None]
    for inputs in dict.fromkeys(layer.quant.inputs for layer in whole):
        group = [layer for layer in whole if layer.quant.inputs == inputs]
        weights = kept if kept is not None and len(group) == len(layers_of(layers)) else stack_codes(group)
        parts, x = shared_bit_linear(
            x, delta, weights, [layer.master for layer in group], rows=[layer.out_features for layer in group],
            gate=gate, activation=activation, bias=_stack_biases(group), norm_weight=norm_weight, norm_eps=norm_eps,
            inputs=inputs, out_dtype=compute_dtype(group[0].weight), backend=group[0].backend,
            gradient=group[0].gradient, learned=[layer.weight_scale for layer in group],
            limits=[layer.quant.largest_code for layer in group],
        )  # fmt: skip
        delta = None
        outputs |= {id(layer): part for layer, part in zip(group, parts, strict=True)}
    x = residual_sum(x, delta)
    rest = [layer for layer in layers if id(layer) not in outputs]
    if rest:
        read = x if gate is None else gated(gate, x, activation)
        # Normed and cast once however many layers read it: the dense twin deserves that as well.
        normed = read if norm is None else rms_norm(read, norm.weight, norm.eps)[0]
        dtype = compute_dtype(rest[0].weight)
        blended: dict[tuple[InputQuant, int], Tensor] = {}
        for layer in rest:
            if isinstance(layer, BitLinear):
                key = layer.quant.inputs, id(layer.input_blend)
                if key not in blended:
                    blended[key] = blended_inputs(normed, layer.quant.inputs, layer.input_blend).to(dtype)
                weight = blended_weights(
                    layer.weight, layer.quantised(), layer.quant.largest_code, layer.weight_blend, layer.weight_scale
                )
                outputs[id(layer)] = F.linear(blended[key], weight.to(dtype), layer.bias)
        normed = normed.to(dtype)
        outputs |= {id(layer): F.linear(normed, layer.weight, layer.bias) for layer in rest if id(layer) not in outputs}
    return [outputs[id(layer)] for layer in layers], x


def layers_of(layers: Sequence[nn.Linear]) -> list[BitLinear]:
    """The BitLinear ones."""
    return [layer for layer in layers if isinstance(layer, BitLinear)]


def stack_codes(layers: Sequence[BitLinear]) -> WeightCodes:
    """Codes int8 (N, K) and row scales float32 (N,) of ``layers``, stacked along the rows."""
    quantised, largest = [layer.quantised() for layer in layers], max(layer.quant.largest_code for layer in layers)
    if len(quantised) == 1:
        return WeightCodes(quantised[0].codes, quantised[0].row_scale(), largest=largest)
    codes, scales = torch.cat([q.codes for q in quantised]), torch.cat([q.row_scale() for q in quantised])
    return WeightCodes(codes, scales, largest=largest)


def _stack_biases(layers: Sequence[BitLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    absent = layers[0].master.new_zeros
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
        return layers_of(self.layers)

    @property
    def stackable(self) -> bool:
        """Whether the quantised layers can be one matmul: they exist and agree on how the input is quantised."""
        return len({layer.quant.inputs for layer in self.bit_layers}) == 1

    @property
    def kept(self) -> WeightCodes | None:
        """The stacked codes held as buffers, or None while they are derived in every forward."""
        if self.codes is None or self.row_scale is None:
            return None
        largest = max(layer.quant.largest_code for layer in self.bit_layers)
        return WeightCodes(self.codes, self.row_scale, self.backward_codes, largest)

    def keep(self, kept: WeightCodes | None) -> None:
        """Hold these stacked codes as buffers from now on (None: derive them again). The caller keeps them fresh."""
        self.codes, self.row_scale, self.backward_codes = (None, None, None) if kept is None else kept[:3]

    def forward(
        self, x: Tensor, delta: Tensor | None = None, gate: Tensor | None = None, activation: str = ""
    ) -> tuple[list[Tensor], Tensor]:
        """The layers' outputs for ``x + delta`` (..., K) or ``activation(gate) * x``, and the sum in the type of x."""
        return shared_input_forward(x, delta, self.layers, self.norm_ref[0], self.kept, gate, activation)


def quantiser_input(module: SharedInput, options: dict[str, Any], returned: tuple[list[Tensor], Tensor]) -> Tensor:
    """What the quantiser of ``module`` was given in a call with keywords ``options`` that returned ``returned``: the
    gated or summed input behind the norm, float32 (..., K). For forward hooks: the fused forward keeps none of it."""
    _, x = returned
    if options:
        x = gated(options["gate"], x, options["activation"])
    norm = module.norm_ref[0]
    return x.float() if norm is None else rms_norm(x, norm.weight, norm.eps)[0]


def wide_enough(gate: Tensor, activation: str) -> None:
    """Raises ValueError when squared ReLU of ``gate`` would overflow its float16."""
    if activation == "relu2" and gate.dtype is torch.float16:
        raise ValueError("squared ReLU overflows float16: run this model in bfloat16 or float32")
