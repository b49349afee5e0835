"""Activations to 8-bit codes, one scale per token, optionally with the RMSNorm before it as one float32 operation."""

from typing import NamedTuple

import torch
from torch import Tensor

ABSMAX_FLOOR = 1e-5


class TokenCodes(NamedTuple):
    """Quantised activations: ``codes`` int8 (..., K), ``scale`` float32 (..., 1)."""

    codes: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        """The float32 values that the codes stand for, shape (..., K)."""
        return self.codes.float() * self.scale


def residual_sum(x: Tensor, delta: Tensor | None) -> Tensor:
    """The residual stream ``x + delta``, added in float32 and rounded once to the type of x; x itself without delta."""
    return x if delta is None else (x.float() + delta.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension in float32: ``x * rsqrt(mean(x^2) + eps) * weight``.

    Returns the float32 result (..., K) and the reciprocal root mean square (..., 1), which the backward needs.
    """
    x = x.float()
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    normed = x * rstd
    return (normed if weight is None else normed * weight.float()), rstd


def quantise_tokens(x: Tensor) -> TokenCodes:
    """Per-token absmax quantisation of x (..., K) to int8.

    ``m = max|x|`` of the token clamped at 1e-5; ``codes = clip(round(x * (127 / m)), -128, 127)`` in float32 with
    rounding half to even; ``scale = m / 127`` (BitNet b1.58's reference code; the same ``m`` both ways). A token with a
    NaN or an infinity gets a NaN scale (its codes are arbitrary), so that every output it takes part in is NaN.
    """
    x = x.float()
    absmax = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    finite = torch.isfinite(absmax)
    clamped = torch.where(finite, absmax, torch.ones_like(absmax)).clamp(min=ABSMAX_FLOOR)
    codes = torch.round(x * (127.0 / clamped)).clamp(-128, 127).to(torch.int8)
    return TokenCodes(codes, torch.where(finite, divided(clamped, 127.0), torch.full_like(clamped, torch.nan)))


def divided(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor``, correctly rounded on every device: CUDA multiplies by the reciprocal of a Python number."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)
