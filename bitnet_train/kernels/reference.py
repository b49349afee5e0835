"""The reference backend: plain PyTorch on any device. Every other backend is tested against it."""

import torch
from torch import Tensor

from bitnet_train.quant.activations import TokenCodes, quantise_tokens, rms_norm


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

    def unsupported(self, device: torch.device) -> str | None:
        return None

    def quantise(self, x: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[TokenCodes, Tensor | None]:
        if norm_weight is None:
            return quantise_tokens(x), None
        normed, rstd = rms_norm(x, norm_weight, eps)
        return quantise_tokens(normed), rstd

    def matmul(self, x: TokenCodes, codes_w: Tensor, row_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        return self.dequantise(self.integer_product(x.codes, codes_w), x.scale, row_scale, out_dtype)

    def integer_product(self, codes_x: Tensor, codes_w: Tensor) -> Tensor:
        """``codes_x @ codes_w.T`` (M, N), integers held in float32."""
        check_width(codes_x)
        # Autocast would run this matmul in bf16, whose result rounds integers above 256.
        with torch.autocast(codes_x.device.type, enabled=False):
            return codes_x.float() @ codes_w.float().t()

    @staticmethod
    def dequantise(product: Tensor, scale_x: Tensor, row_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """``product * scale_x * row_scale`` in float32, rounded once to ``out_dtype``."""
        return (product * scale_x * row_scale).to(out_dtype)

    def grad_input(self, grad: Tensor, codes_w: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
        scaled = (grad.float() * row_scale).to(dtype)
        with torch.autocast(grad.device.type, enabled=False):
            return scaled @ codes_w.to(dtype)

    def grad_weight(self, grad: Tensor, x: TokenCodes, dtype: torch.dtype) -> Tensor:
        with torch.autocast(grad.device.type, enabled=False):
            return grad.to(dtype).t() @ x.dequantise().to(dtype)

    def grad_norm(self, grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = grad.float(), x.float()
        unit = x * rstd
        grad_unit = grad * weight.float()
        grad_x = rstd * (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True))
        return grad_x, (grad * unit).sum(0)
