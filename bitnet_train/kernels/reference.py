"""The reference backend: plain PyTorch on any device. Every other backend is tested against it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_train.kernels.backend import Quantised, WeightCodes
from bitnet_train.quant.activations import TokenCodes, quantise_tokens, residual_sum, rms_norm
from bitnet_train.quant.gradients import (
    FP8,
    block_weight_gradient,
    quantise_gradient_blocks,
    quantise_gradient_rows,
)
from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import Codes, quantise_weight

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def check_width(codes_x: Tensor) -> None:
    """Raises ValueError when products of codes (M, K) can pass the integers that float32 holds."""
    if codes_x.shape[-1] * 128 >= 2**24:
        raise ValueError(f"K={codes_x.shape[-1]} is too wide for an exact float32 product of codes (131,071 at most)")


class ReferenceBackend:
    """Float matmuls on integer codes.

    The product of codes is exact: float32 operands, accumulation and result hold every integer up to 2^24, and a sum
    of K products is at most 128 K in magnitude, so K up to 131,071 gives what an integer matmul gives, bit for bit.
    """

    name = "reference"
    device_types: tuple[str, ...] | None = None

    def unsupported(self, device: torch.device) -> str | None:
        return None

    def quantise_weight(
        self,
        weight: Tensor,
        layer: LayerQuant,
        codes: Tensor | None = None,
        backward: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Codes:
        fresh = quantise_weight(weight, layer, scale)
        if backward is not None:
            backward.copy_(fresh.codes.t())
        return fresh if codes is None else Codes(codes.copy_(fresh.codes), fresh.scale)

    def backward_layout(self, codes_w: Tensor, dx: str) -> Tensor | None:
        return None

    def quantise(self, x: Tensor, delta: Tensor | None, norm_weight: Tensor | None, eps: float) -> Quantised:
        stream = residual_sum(x, delta)
        if norm_weight is None:
            return Quantised(quantise_tokens(stream), stream, None)
        normed, rstd = rms_norm(stream, norm_weight, eps)
        return Quantised(quantise_tokens(normed), stream, rstd)

    def matmul(self, x: TokenCodes, w: WeightCodes, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        check_width(x.codes)
        w = w.unpacked(x.codes.shape[-1])
        product = self.integer_product(x.codes, w.codes, w.largest) * x.scale * w.row_scale
        return (product if bias is None else product + bias.float()).to(out_dtype)

    def integer_product(self, codes_x: Tensor, codes_w: Tensor, largest: int = 1) -> Tensor:
        """``codes_x @ codes_w.T`` (M, N), integers held in float32 or int32; weights are at most ``largest``."""
        # Sums that float32 would round on the way are rounded once, as those of an int32 product are.
        exact = torch.float32 if codes_x.shape[-1] * 128 * largest < 2**24 else torch.float64
        # Autocast would run this matmul in bf16, whose result rounds integers above 256.
        with torch.autocast(codes_x.device.type, enabled=False):
            return (codes_x.to(exact) @ codes_w.to(exact).t()).float()

    def grad_input(self, grads: Sequence[Tensor], w: WeightCodes, dx: str, out_dtype: torch.dtype) -> Tensor:
        grad = grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)
        with torch.autocast(grad.device.type, enabled=False):
            if dx in FLOATS:
                dtype = FLOATS[dx]
                return ((grad.float() * w.row_scale).to(dtype) @ w.codes.to(dtype)).to(out_dtype)
            codes = quantise_gradient_rows(grad, w.row_scale, torch.int8 if dx == "int8" else FP8)
            if dx == "int8":
                product = self.integer_product(codes.codes, w.codes.t(), w.largest)
            else:
                product = codes.codes.float() @ w.codes.float()
            return (product * codes.scale).to(out_dtype)

    def grad_weight(self, grads: Sequence[Tensor], x: TokenCodes, dw: str) -> list[Tensor]:
        with torch.autocast(x.codes.device.type, enabled=False):
            if dw in FLOATS:
                inputs = x.dequantise().to(FLOATS[dw])
                return [grad.to(FLOATS[dw]).t() @ inputs for grad in grads]
            return [block_weight_gradient(*quantise_gradient_blocks(grad, x.scale), x.codes) for grad in grads]

    def grad_norm(
        self, grad: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, grad_stream: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        grad, unit = grad.float(), stream.float() * rstd
        grad_unit = grad * weight.float()
        grad_x = rstd * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
        if grad_stream is not None:
            grad_x = grad_x + grad_stream.float()
        return grad_x.to(stream.dtype), (grad * unit).sum(0)
