# mypy: allow-untyped-defs
"""Residual add, RMSNorm and quantisation of tokens as one kernel, and the norm's backward.

The arithmetic is that of :mod:`bitnet_train.quant.activations`, operation by operation: float32, IEEE divisions and
square roots, and no fused multiply-add (every launch passes ``enable_fp_fusion=False``), because each of these moves
codes. Arguments of kernels carry no types because Triton refuses annotations other than constexpr.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.quant.activations import ABSMAX_FLOOR

FLOOR = tl.constexpr(ABSMAX_FLOOR)
LARGEST = tl.constexpr(127.0)
INFINITY_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
MAGNITUDE_MASK = tl.constexpr(0x7FFFFFFF)
# 1.5 * 2^23: added to |v| < 2^22 it leaves no fraction bits, so the sum is v rounded half to even, and the low byte of
# its bit pattern is that integer in two's complement.
ROUNDER = tl.constexpr(12582912.0)

# A row up to this wide is held in registers; a wider one is read again for every pass.
WIDEST_HELD = 16384
WIDEST_HELD_BACKWARD = 8192
LONG_ROW_BLOCK = 4096
# The norm's weight gradient is added up in this many chunks of rows at most, each of at least so many rows: enough
# programs for any GPU, few enough that the partial sums stay small beside the tensors read.
ROW_CHUNKS = 512
ROWS_PER_CHUNK = 8


class RowTile(NamedTuple):
    """How rows are shared out: ``rows`` x ``block`` elements to each program of ``warps`` warps."""

    rows: int
    block: int
    warps: int


def row_tile(width: int, widest: int = WIDEST_HELD) -> RowTile:
    """Whole rows to a program, several of them while they are short; above ``widest``, blocks of one row."""
    if width > widest:
        return RowTile(1, LONG_ROW_BLOCK, 16)
    block = triton.next_power_of_2(width)
    elements = max(block, 2048)
    return RowTile(elements // block, block, min(elements // 512, 16))


def unit_stride(x: Tensor) -> Tensor:
    """``x`` (M, K) itself where its rows are contiguous, whatever lies between them; else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def magnitude_bits(x):
    """The bits of ``|x|``. As integers they order like magnitudes with infinity and then NaN on top, so that an
    integer maximum finds the largest magnitude and keeps a NaN, which the maximum of floats drops."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE_MASK


@triton.jit
def clamped_magnitude(bits, floor: tl.constexpr):
    """Largest-magnitude bits to the float, at least ``floor``, and 1 where it is not finite."""
    return tl.maximum(tl.where(bits < INFINITY_BITS, bits, ONE_BITS).to(tl.float32, bitcast=True), floor)


@triton.jit
def inverse_scale(absmax, largest: tl.constexpr):
    """``largest / absmax`` as PyTorch divides a number by a tensor: reciprocal, then product, two roundings."""
    return tl.div_rn(1.0, absmax) * largest


@triton.jit
def direct_scale(absmax, bits, largest: tl.constexpr):
    """``absmax / largest``, NaN where the largest magnitude was not finite."""
    return tl.where(bits < INFINITY_BITS, tl.div_rn(absmax, largest), float("nan"))


@triton.jit
def rounded_codes(x, inverse):
    """``round(x * inverse)``, half to even, as int8. No clip: the product is at most 127 and a rounding error."""
    return (x * inverse + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def load_tokens(x, delta, stream, x_offset, delta_offset, inside):
    """What is normed, float32: x, or ``x + delta`` as the stream's type holds it."""
    value = tl.load(x + x_offset, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + delta_offset, mask=inside, other=0.0).to(tl.float32)
        value = value.to(stream.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def reciprocal_rms(squares, width, eps):
    """``1 / sqrt(squares / width + eps)`` in correctly rounded steps; the hardware's rsqrt is an approximation."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, width * 1.0) + eps))


@triton.jit
def quantise_tokens_kernel(
    x, delta, weight, codes, scale, stream, rstd,
    tokens, width, x_stride, delta_stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, held in registers: one pass over memory."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    present = rows < tokens
    inside = present & (columns < width)
    value = load_tokens(x, delta, stream, rows * x_stride + columns, rows * delta_stride + columns, inside)
    if delta is not None:
        tl.store(stream + rows * width + columns, value.to(stream.dtype.element_ty), mask=inside)
    if weight is not None:
        reciprocal = reciprocal_rms(tl.sum(value * value, axis=1, keep_dims=True), width, eps)
        tl.store(rstd + rows, reciprocal, mask=present)
        value = value * reciprocal * tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    bits = tl.max(magnitude_bits(value), axis=1, keep_dims=True)
    absmax = clamped_magnitude(bits, FLOOR)
    tl.store(scale + rows, direct_scale(absmax, bits, LARGEST), mask=present)
    tl.store(codes + rows * width + columns, rounded_codes(value, inverse_scale(absmax, LARGEST)), mask=inside)


@triton.jit
def quantise_long_tokens_kernel(
    x, delta, weight, codes, scale, stream, rstd,
    width, x_stride, delta_stride, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row wider than registers hold: sum of squares, largest magnitude and codes in a pass each."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * width
    if delta is not None:
        delta += row * delta_stride
        stream += row * width
    columns = tl.arange(0, BLOCK)
    # Every pass computes the sum again: reading back what other threads of the program wrote would need a barrier.
    if delta is not None or weight is not None:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            at = start + columns
            value = load_tokens(x, delta, stream, at, at, at < width)
            squares += value * value
            if delta is not None:
                tl.store(stream + at, value.to(stream.dtype.element_ty), mask=at < width)
        if weight is not None:
            reciprocal = reciprocal_rms(tl.sum(squares, axis=0), width, eps)
            tl.store(rstd + row, reciprocal)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        at = start + columns
        value = load_tokens(x, delta, stream, at, at, at < width)
        if weight is not None:
            value = value * reciprocal * tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(value))
    bits = tl.max(largest, axis=0)
    absmax = clamped_magnitude(bits, FLOOR)
    inverse = inverse_scale(absmax, LARGEST)
    tl.store(scale + row, direct_scale(absmax, bits, LARGEST))
    for start in range(0, width, BLOCK):
        at = start + columns
        value = load_tokens(x, delta, stream, at, at, at < width)
        if weight is not None:
            value = value * reciprocal * tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(codes + at, rounded_codes(value, inverse), mask=at < width)


def quantise(
    x: Tensor, delta: Tensor | None, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tokens to 8-bit codes through an optional residual add and an optional RMSNorm, in one pass over memory.

    Args:
        x: (M, K), float32, bfloat16 or float16, rows any distance apart.
        delta: (M, K) to be added to x first, any of these types, or None.
        norm_weight: (K,) of an RMSNorm before the quantiser, or None for no norm.
        eps: the norm's epsilon.

    Returns:
        codes int8 (M, K); scale float32 (M, 1), NaN for a token with a NaN or an infinity (its codes are arbitrary);
        the stream (M, K), ``x + delta`` rounded to x's type, which is also what the norm reads (None without delta);
        the norm's 1/rms float32 (M, 1) (None without norm).

    Raises ValueError for a delta of another shape.
    """
    tokens, width = x.shape
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta {tuple(delta.shape)} must have the shape of x {tuple(x.shape)}")
    x = unit_stride(x)
    delta = None if delta is None else unit_stride(delta)
    codes = torch.empty((tokens, width), dtype=torch.int8, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    stream = None if delta is None else torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    rstd = None if norm_weight is None else torch.empty_like(scale)
    if tokens:
        tile = row_tile(width)
        tensors = (x, delta, None if norm_weight is None else norm_weight.contiguous(), codes, scale, stream, rstd)
        strides = (x.stride(0), 0 if delta is None else delta.stride(0))
        options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": False}
        with torch.cuda.device_of(x):
            if width <= WIDEST_HELD:
                grid = (triton.cdiv(tokens, tile.rows),)
                quantise_tokens_kernel[grid](*tensors, tokens, width, *strides, eps, tile.rows, tile.block, **options)
            else:
                quantise_long_tokens_kernel[(tokens,)](*tensors, width, *strides, eps, tile.block, **options)
    return codes, scale, stream, rstd


@triton.jit
def norm_dot_kernel(
    grad, stream, weight, rstd, dot, width, grad_stride, stream_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one row: ``mean(grad * weight * unit)`` with ``unit = stream * rstd``."""
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_stride
    stream += row * stream_stride
    reciprocal = tl.load(rstd + row)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        inside = at < width
        unit = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32) * reciprocal
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        total += g * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * unit
    tl.store(dot + row, tl.div_rn(tl.sum(total, axis=0), width * 1.0))


@triton.jit
def norm_backward_kernel(
    grad, stream, weight, rstd, dot, grad_stream, grad_x, partial,
    tokens, width, chunk, grad_stride, stream_stride, grad_stream_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of rows, a multiple of ROWS, x BLOCK columns: grad_x, and the chunk's part of the weight gradient.

    ``dot`` comes from :func:`norm_dot_kernel`; without it the block holds whole rows and the mean is taken here.
    """
    first = tl.program_id(0).to(tl.int64) * chunk
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, chunk, ROWS):
        rows = first + start + tl.arange(0, ROWS)[:, None]
        present = rows < tokens
        inside = present & (columns < width)
        reciprocal = tl.load(rstd + rows, mask=present, other=0.0)
        g = tl.load(grad + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        unit = tl.load(stream + rows * stream_stride + columns, mask=inside, other=0.0).to(tl.float32) * reciprocal
        total += g * unit
        g = g * w
        if dot is None:
            mean = tl.div_rn(tl.sum(g * unit, axis=1, keep_dims=True), width * 1.0)
        else:
            mean = tl.load(dot + rows, mask=present, other=0.0)
        result = reciprocal * (g - unit * mean)
        if grad_stream is not None:
            offset = rows * grad_stream_stride + columns
            result += tl.load(grad_stream + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + rows * width + columns, result.to(grad_x.dtype.element_ty), mask=inside)
    offset = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(partial + offset, tl.sum(total, axis=0, keep_dims=True), mask=columns < width)


def norm_backward(
    grad: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, grad_stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Backward of the RMSNorm, with the residual's gradient added in.

    Args:
        grad: (M, K), any float type: gradient of the normed value.
        stream: (M, K), what was normed.
        weight: (K,) of the norm.
        rstd: float32 (M, 1), the norm's 1/rms.
        grad_stream: (M, K), the gradient that reaches the stream past the norm, added in float32, or None.

    Returns:
        grad_x (M, K) in the stream's type, rounded once; grad_weight float32 (K,), added up in an order that depends
        on the shape alone, so that the same inputs give the same bits on every run and every GPU.
    """
    tokens, width = stream.shape
    grad_x = torch.empty((tokens, width), dtype=stream.dtype, device=stream.device)
    if not tokens:
        return grad_x, torch.zeros(width, dtype=torch.float32, device=stream.device)
    grad, stream, weight, rstd = unit_stride(grad), unit_stride(stream), weight.contiguous(), rstd.contiguous()
    grad_stream = None if grad_stream is None else unit_stride(grad_stream)
    tile = row_tile(width, WIDEST_HELD_BACKWARD)
    chunk = tile.rows * triton.cdiv(max(ROWS_PER_CHUNK, triton.cdiv(tokens, ROW_CHUNKS)), tile.rows)
    grid = (triton.cdiv(tokens, chunk), triton.cdiv(width, tile.block))
    partial = torch.empty((grid[0], width), dtype=torch.float32, device=stream.device)
    strides = (grad.stride(0), stream.stride(0), 0 if grad_stream is None else grad_stream.stride(0))
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": False}
    with torch.cuda.device_of(stream):
        dot = None
        if width > WIDEST_HELD_BACKWARD:
            dot = torch.empty((tokens, 1), dtype=torch.float32, device=stream.device)
            norm_dot_kernel[(tokens,)](grad, stream, weight, rstd, dot, width, *strides[:2], tile.block, **options)
        norm_backward_kernel[grid](
            grad, stream, weight, rstd, dot, grad_stream, grad_x, partial, tokens, width, chunk, *strides,
            tile.rows, tile.block, **options,
        )  # fmt: skip
        return grad_x, partial.sum(0)


def _specialisations() -> list[Specialisation]:
    """Every tile that :func:`row_tile` hands out for common widths, with the types that need the most registers."""
    found = []
    sizes = {"tokens": "i32", "width": "i32:16", "x_stride": "i32:16", "delta_stride": "i32:16", "eps": "fp32"}
    for width in (256, 1024, 2048, 4096, 8192, 16384, WIDEST_HELD + 1):
        tile, held = row_tile(width), width <= WIDEST_HELD
        for x, delta, weight in (("*bf16", None, None), ("*bf16", "*bf16", "*fp32"), ("*fp32", "*bf16", "*fp32")):
            pointers = {"x": x, "delta": delta, "weight": weight, "codes": "*i8", "scale": "*fp32",
                        "stream": delta and x, "rstd": weight and "*fp32"}  # fmt: skip
            signature = {name: f"{type_}:16" for name, type_ in pointers.items() if type_} | sizes
            constants: dict[str, object] = {name: None for name, type_ in pointers.items() if not type_}
            constants["BLOCK"] = tile.block
            if held:
                constants["ROWS"] = tile.rows
            else:
                signature.pop("tokens")
            kernel = quantise_tokens_kernel if held else quantise_long_tokens_kernel
            found.append(Specialisation(kernel, signature, constants, tile.warps, 1, quantiser=True))
    row_sizes = {"width": "i32:16", "grad_stride": "i32:16", "stream_stride": "i32:16"}
    shared = {"grad": "*bf16:16", "weight": "*fp32:16", "rstd": "*fp32:16"}
    for width in (256, 1024, 2048, 4096, 8192, WIDEST_HELD_BACKWARD + 1):
        tile, held = row_tile(width, WIDEST_HELD_BACKWARD), width <= WIDEST_HELD_BACKWARD
        for stream in ("*bf16:16", "*fp32:16"):
            common = shared | {"stream": stream} | row_sizes
            signature = common | {"grad_stream": stream, "grad_x": stream, "partial": "*fp32:16", "tokens": "i32",
                                  "chunk": "i32", "grad_stream_stride": "i32:16"}  # fmt: skip
            constants = {"ROWS": tile.rows, "BLOCK": tile.block}
            if held:
                constants["dot"] = None
            else:
                signature["dot"] = "*fp32:16"
                found.append(
                    Specialisation(norm_dot_kernel, common | {"dot": "*fp32:16"}, {"BLOCK": tile.block}, tile.warps, 1)
                )
            found.append(Specialisation(norm_backward_kernel, signature, constants, tile.warps, 1))
    return found


SPECIALISATIONS = _specialisations()
