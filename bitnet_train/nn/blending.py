"""Between float and quantised: values on the way from a weight or an input to what its code stands for."""

from typing import Any

import torch
from torch import Tensor

from bitnet_train.quant.activations import quantise_inputs
from bitnet_train.quant.hadamard import rotate
from bitnet_train.quant.spec import InputQuant
from bitnet_train.quant.weights import SCALE_FLOOR, Codes, scale_gradient


def blended_inputs(x: Tensor, inputs: InputQuant, blend: Tensor | None) -> Tensor:
    """``x + blend * (q(x) - x)`` in float32 for x (..., K), after the rotation that ``inputs`` may ask for.

    The gradient passes straight through the quantiser. Without bits, or without ``blend``, only the rotation is left.
    """
    x = rotate(x) if inputs.hadamard else x.float()
    if inputs.bits is None or blend is None:
        return x
    values = quantise_inputs(x.detach(), inputs).dequantise()
    return x + (blend * (values - x.detach()))


def blended_weights(weight: Tensor, codes: Codes, largest: int, blend: Tensor | None, learned: Tensor | None) -> Tensor:
    """``w + blend * (q(w) - w)`` for w (out, in), ``blend`` a number or a mask (out, in).

    The gradient of w is that of the result; a ``learned`` scale (groups,) receives LSQ's, weighted with ``blend``.
    """
    if blend is None:
        return weight
    if learned is None:
        return weight + (blend * (codes.dequantise() - weight.detach())).to(weight.dtype)
    values: Tensor = _LearnedValues.apply(weight, learned, codes.codes, largest)
    return weight + (blend * (values - weight)).to(weight.dtype)


class _LearnedValues(torch.autograd.Function):
    """Codes times a learned scale."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, learned: Tensor, codes: Tensor, largest: int) -> Tensor:
        ctx.save_for_backward(weight, learned, codes)
        ctx.largest = largest
        return Codes(codes, learned.float().clamp(min=SCALE_FLOOR)).dequantise()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, learned, codes = ctx.saved_tensors
        kept = Codes(codes, learned.detach().float().clamp(min=SCALE_FLOOR))
        return grad.to(weight.dtype), scale_gradient(weight, grad, kept, ctx.largest).to(learned.dtype), None, None
