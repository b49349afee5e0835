"""Low-precision gradient matmuls: how dY is quantised for dX and for dW. Plain PyTorch, the oracle of fused kernels.

The straight-through gradients of a layer ``Y = (X_codes @ W_codes.T) * scale_x * row_scale`` are::

    dX = (dY * row_scale) @ W_codes          dW = (dY * scale_x).T @ X_codes

One operand of each product is already integers, so only dY loses anything. Its rows (dX) or its columns within blocks
of tokens (dW) get a scale each. The ideas are those of per-token and per-block scaling in 8-bit training (SwitchBack,
arXiv 2304.13013; DeepSeek-V3, arXiv 2412.19437, section 3.3); that codes of ternary layers are exact in any type is
what makes them cheap here.
"""

import torch
from torch import Tensor

from bitnet_train.quant.activations import TokenCodes, divided

# Gradients are many orders of magnitude below activations, so the floor only keeps 127 / m finite.
GRADIENT_FLOOR = 1e-30
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
BLOCK_TOKENS = 128


def _absmax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude along ``dim`` (kept), at least the floor and 1 where not finite; and where it is finite."""
    absmax = torch.linalg.vector_norm(x, torch.inf, dim=dim, keepdim=True)
    finite = torch.isfinite(absmax)
    return torch.where(finite, absmax, torch.ones_like(absmax)).clamp(min=GRADIENT_FLOOR), finite


def quantise_gradient_rows(grad: Tensor, row_scale: Tensor, dtype: torch.dtype = torch.int8) -> TokenCodes:
    """``grad * row_scale`` to int8 or float8_e4m3fn, one scale per token.

    grad (M, N), row_scale float32 (N,) -> codes (M, N) and scale float32 (M, 1), with ``m = max|grad * row_scale|`` of
    the token: ``codes = round(g * (127 / m))`` (half to even) or ``float8(g * (448 / m))``, ``scale = m / 127`` or
    ``m / 448``. A token with a NaN or an infinity gets a NaN scale; its codes are arbitrary.
    """
    g = grad.float() * row_scale
    absmax, finite = _absmax(g, -1)
    largest = 127.0 if dtype is torch.int8 else FP8_LARGEST
    scaled = torch.where(finite, g * (largest / absmax), 0.0)
    codes = torch.round(scaled).to(torch.int8) if dtype is torch.int8 else scaled.to(dtype)
    return TokenCodes(codes, torch.where(finite, divided(absmax, largest), torch.nan))


def quantise_gradient_blocks(grad: Tensor, scale_x: Tensor) -> tuple[Tensor, Tensor]:
    """``grad * scale_x`` to int8, one scale per column and block of 128 tokens.

    grad (M, N), scale_x float32 (M, 1) -> codes int8 (M, N) and scale float32 (ceil(M / 128), N); the last block may be
    shorter. A column of a block with a NaN or an infinity gets a NaN scale.
    """
    codes, scales = [], []
    for block in torch.split(grad.float() * scale_x, BLOCK_TOKENS):
        absmax, finite = _absmax(block, 0)
        codes.append(torch.round(torch.where(finite, block * (127.0 / absmax), 0.0)).to(torch.int8))
        scales.append(torch.where(finite, divided(absmax, 127.0), torch.nan))
    return torch.cat(codes), torch.cat(scales)


def block_weight_gradient(codes: Tensor, scale: Tensor, codes_x: Tensor) -> Tensor:
    """dW from block codes: ``sum_b scale[b, :, None] * (codes_b.T @ codes_x_b)``, float32 (N, K).

    codes int8 (M, N) and scale (blocks, N) from :func:`quantise_gradient_blocks`, codes_x int8 (M, K). The products of
    a block are exact integers; blocks are added in order in float32.
    """
    total = codes.new_zeros((codes.shape[1], codes_x.shape[1]), dtype=torch.float32)
    parts = zip(torch.split(codes, BLOCK_TOKENS), torch.split(codes_x, BLOCK_TOKENS), scale, strict=True)
    for g, x, s in parts:
        total += (g.float().t() @ x.float()) * s[:, None]
    return total
