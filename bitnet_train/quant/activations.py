"""Activations to 8-bit codes, one scale per token, optionally with the RMSNorm before it as one float32 operation."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_train.quant.spec import InputQuant

ABSMAX_FLOOR = 1e-5


class TokenCodes(NamedTuple):
    """Quantised activations: ``codes`` int8 (..., K), ``scale`` float32 (..., 1), or (..., G) for G groups of
    neighbouring channels."""

    codes: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        """The float32 values that the codes stand for, shape (..., K)."""
        if self.scale.shape[-1] == 1:
            return self.codes.float() * self.scale
        spans = self.codes.float().unflatten(-1, (self.scale.shape[-1], -1))
        return (spans * self.scale[..., None]).flatten(-2)


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


def quantise_inputs(x: Tensor, inputs: InputQuant) -> TokenCodes:
    """x (M, K) to int8 codes and scales under ``inputs``; the input must have been rotated already, where it is to be.

    With ``largest = 2^(bits - 1) - 1`` and the statistic taken over a token (scale (M, 1)), over ``group_size``
    neighbouring channels of one (scale (M, K / group_size)), or over the whole of x (scale (M, 1), all equal)::

        absmax   m = max|x|    codes = clip(round(x * (largest / m)), -largest - 1, largest)   scale = m / largest
        absmean  b = mean|x|   codes = the same with m = b * sqrt(largest)

    absmean at 4 bits is BitNet a4.8's (arXiv 2411.04965, equation 2). With ``top_k`` below 1, only that share of a
    token's inputs, the largest magnitudes, is kept (equation 3 there), before the statistic is taken. What is not
    finite gives a NaN scale, as in :func:`quantise_tokens`.
    """
    assert inputs.bits is not None
    x = x.float()
    if inputs.top_k < 1:
        kept = max(1, round(inputs.top_k * x.shape[-1]))
        smallest = x.abs().topk(kept, dim=-1).values[..., -1:]
        # NaN compares false and stays, so that it shows.
        x = torch.where(x.abs() < smallest, 0.0, x)
    if inputs.standard or replace(inputs, top_k=1.0, hadamard=False).standard:
        return quantise_tokens(x)
    largest = float(2 ** (inputs.bits - 1) - 1)
    spans = x.unflatten(-1, (-1, inputs.group_size or x.shape[-1]))
    if not x.numel():  # nothing has no largest magnitude
        return TokenCodes(x.to(torch.int8), x.new_zeros(spans.shape[:-1]))
    dims = -1 if inputs.granularity != "tensor" else tuple(range(spans.dim()))
    if inputs.statistic == "absmax":
        reach = torch.linalg.vector_norm(spans, torch.inf, dim=dims, keepdim=True)
    else:
        # 4-bit codes end at 7 = (sqrt 7)^2: the statistic times sqrt(largest) takes the place of the largest magnitude.
        reach = spans.abs().mean(dim=dims, keepdim=True) * math.sqrt(largest)
    finite = torch.isfinite(reach)
    clamped = torch.where(finite, reach, torch.ones_like(reach)).clamp(min=ABSMAX_FLOOR)
    codes = torch.nan_to_num(torch.round(spans * (largest / clamped))).clamp(-largest - 1, largest).to(torch.int8)
    scale = torch.where(finite, divided(clamped, largest), torch.nan).squeeze(-1)
    return TokenCodes(codes.flatten(-2), scale.expand(*x.shape[:-1], scale.shape[-1]).contiguous())


def divided(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor``, correctly rounded on every device: CUDA multiplies by the reciprocal of a Python number."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)
