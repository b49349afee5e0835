# mypy: allow-untyped-defs
"""Output gradients to 8-bit codes for the gradient matmuls: by token for dX, by column and block of tokens for dW.

The arithmetic is that of :mod:`bitnet_train.quant.gradients`; where a scale is NaN the codes are arbitrary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_train.kernels.triton.activations import (
    LARGEST,
    WIDEST_HELD,
    clamped_magnitude,
    direct_scale,
    inverse_scale,
    magnitude_bits,
    rounded_codes,
    row_tile,
    unit_stride,
)
from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.quant.gradients import BLOCK_TOKENS, FP8, FP8_LARGEST, GRADIENT_FLOOR

FLOOR = tl.constexpr(GRADIENT_FLOOR)
# Few warps, so that a thread holds many rows and divides seldom: one reciprocal serves a column of a thread.
BLOCK_COLUMNS = 64
BLOCK_WARPS = 4


@triton.jit
def load_scaled(grad, row_scale, offset, column, inside):
    """``grad * row_scale`` in float32, or the gradient alone."""
    value = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if row_scale is not None:
        value *= tl.load(row_scale + column, mask=inside, other=0.0)
    return value


@triton.jit
def to_codes(value, inverse, codes):
    """``value * inverse`` as the type that ``codes`` points to holds it, half to even."""
    if codes.dtype.element_ty == tl.int8:
        result = rounded_codes(value, inverse)
    else:
        result = (value * inverse).to(codes.dtype.element_ty)
    return result


@triton.jit
def quantise_rows_kernel(
    grad, row_scale, codes, scale, tokens, width, grad_stride,
    HIGHEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, held in registers: one pass over memory."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < tokens) & (columns < width)
    value = load_scaled(grad, row_scale, rows * grad_stride + columns, columns, inside)
    bits = tl.max(magnitude_bits(value), axis=1, keep_dims=True)
    absmax = clamped_magnitude(bits, FLOOR)
    tl.store(scale + rows, direct_scale(absmax, bits, HIGHEST), mask=rows < tokens)
    tl.store(codes + rows * width + columns, to_codes(value, inverse_scale(absmax, HIGHEST), codes), mask=inside)


@triton.jit
def quantise_long_rows_kernel(
    grad, row_scale, codes, scale, width, grad_stride, HIGHEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row wider than registers hold: largest magnitude and codes in a pass each."""
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_stride
    codes += row * width
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, magnitude_bits(load_scaled(grad, row_scale, at, at, at < width)))
    bits = tl.max(largest, axis=0)
    absmax = clamped_magnitude(bits, FLOOR)
    inverse = inverse_scale(absmax, HIGHEST)
    tl.store(scale + row, direct_scale(absmax, bits, HIGHEST))
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = load_scaled(grad, row_scale, at, at, at < width)
        tl.store(codes + at, to_codes(value, inverse, codes), mask=at < width)


def quantise_rows(grad: Tensor, row_scale: Tensor | None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """``grad * row_scale`` to codes with one scale per token:
    :func:`bitnet_train.quant.gradients.quantise_gradient_rows`.

    Args:
        grad: (M, N), float32, bfloat16 or float16, rows any distance apart.
        row_scale: float32 (N,), or None for ones.
        dtype: int8, or float8_e4m3fn (GPUs from compute capability 8.9).

    Returns:
        codes (M, N) in ``dtype`` and scale float32 (M, 1), NaN for a token with a NaN or an infinity.
    """
    if dtype not in (torch.int8, FP8):
        raise ValueError(f"gradients are quantised to int8 or {FP8}, not to {dtype}")
    tokens, width = grad.shape
    grad = unit_stride(grad)
    codes = torch.empty((tokens, width), dtype=dtype, device=grad.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=grad.device)
    if tokens:
        tile = row_tile(width)
        tensors = (grad, None if row_scale is None else row_scale.contiguous(), codes, scale)
        highest = LARGEST.value if dtype is torch.int8 else FP8_LARGEST
        options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": False}
        with torch.cuda.device_of(grad):
            if width <= WIDEST_HELD:
                grid = (triton.cdiv(tokens, tile.rows),)
                quantise_rows_kernel[grid](
                    *tensors, tokens, width, grad.stride(0), highest, tile.rows, tile.block, **options
                )
            else:
                quantise_long_rows_kernel[(tokens,)](*tensors, width, grad.stride(0), highest, tile.block, **options)
    return codes, scale


@triton.jit
def quantise_blocks_kernel(
    grad, scale_x, codes, scale, tokens, width, grad_stride, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One block of TOKENS tokens x COLUMNS columns."""
    column_tiles = tl.cdiv(width, COLUMNS)
    block = (tl.program_id(0) // column_tiles).to(tl.int64)
    rows = block * TOKENS + tl.arange(0, TOKENS)
    columns = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    value = tl.load(grad + (rows * grad_stride)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale_x + rows, mask=rows < tokens, other=0.0)[:, None]
    bits = tl.max(magnitude_bits(value), axis=0)
    absmax = clamped_magnitude(bits, FLOOR)
    tl.store(scale + block * width + columns, direct_scale(absmax, bits, LARGEST), mask=columns < width)
    result = rounded_codes(value, inverse_scale(absmax, LARGEST)[None, :])
    tl.store(codes + (rows * width)[:, None] + columns[None, :], result, mask=inside)


def quantise_blocks(grad: Tensor, scale_x: Tensor) -> tuple[Tensor, Tensor]:
    """``grad * scale_x`` to int8 with one scale per column and block of 128 tokens:
    :func:`bitnet_train.quant.gradients.quantise_gradient_blocks`.

    Args:
        grad: (M, N), float32, bfloat16 or float16, rows any distance apart.
        scale_x: float32 (M, 1), of the layer's quantised input.

    Returns:
        codes int8 (M, N) and scale float32 (ceil(M / 128), N), NaN for a column of a block with a NaN or an infinity.
    """
    tokens, width = grad.shape
    grad, scale_x = unit_stride(grad), scale_x.contiguous()
    blocks = triton.cdiv(tokens, BLOCK_TOKENS)
    codes = torch.empty((tokens, width), dtype=torch.int8, device=grad.device)
    scale = torch.empty((blocks, width), dtype=torch.float32, device=grad.device)
    if tokens:
        grid = (blocks * triton.cdiv(width, BLOCK_COLUMNS),)
        with torch.cuda.device_of(grad):
            quantise_blocks_kernel[grid](
                grad, scale_x, codes, scale, tokens, width, grad.stride(0), BLOCK_TOKENS, BLOCK_COLUMNS,
                num_warps=BLOCK_WARPS, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, scale


def _specialisations() -> list[Specialisation]:
    """Every tile that :func:`row_tile` hands out for common widths, both types of gradient and both types of code."""
    found = []
    sizes = {"tokens": "i32", "width": "i32:16", "grad_stride": "i32:16"}
    for grad in ("*bf16:16", "*fp32:16"):
        for width in (256, 1024, 2048, 4096, 8192, 16384, WIDEST_HELD + 1):
            tile, held = row_tile(width), width <= WIDEST_HELD
            for codes, highest, minimum in (("*i8:16", LARGEST.value, 80), ("*fp8e4nv:16", FP8_LARGEST, 89)):
                signature = {"grad": grad, "row_scale": "*fp32:16", "codes": codes, "scale": "*fp32:16"} | sizes
                constants: dict[str, object] = {"HIGHEST": highest, "BLOCK": tile.block}
                if held:
                    constants["ROWS"] = tile.rows
                else:
                    signature.pop("tokens")
                kernel = quantise_rows_kernel if held else quantise_long_rows_kernel
                found.append(
                    Specialisation(kernel, signature, constants, tile.warps, 1, quantiser=True, minimum=minimum)
                )
        signature = {"grad": grad, "scale_x": "*fp32:16", "codes": "*i8:16", "scale": "*fp32:16"} | sizes
        constants = {"TOKENS": BLOCK_TOKENS, "COLUMNS": BLOCK_COLUMNS}
        found.append(Specialisation(quantise_blocks_kernel, signature, constants, BLOCK_WARPS, 1, quantiser=True))
    return found


SPECIALISATIONS = _specialisations()
