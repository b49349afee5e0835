"""Matmuls with codes: int8 or float8 by int8 or float8, int8 by packed 2-bit weights, and floats by int8 weights.

Every kernel is persistent (blocks walk over tiles of the result) and writes its result once, scaled in float32. On GPUs
with a tensor memory accelerator, operands that are aligned for it are copied by it; otherwise through pointers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_train.kernels.reference import check_width
from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.kernels.triton.tuning import (
    FLOAT,
    FLOAT32,
    FP8,
    INT8,
    PACKED,
    TMA_ALIGNMENT,
    Family,
    launch,
    persistent_grid,
    rows_contiguous,
    specialisations,
    token_bucket,
    uses_tma,
)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Rows of tiles that are walked together, column by column, so that both operands are found in the L2 cache.
GROUP = tl.constexpr(8)


@triton.jit
def tile_position(  # type: ignore[no-untyped-def]
    tile, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """First row and first column of a tile of the result, by its number."""
    tile_rows = tl.cdiv(rows, BLOCK_ROWS)
    in_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    first = tile // in_group * GROUP
    height = min(tile_rows - first, GROUP)
    return (first + tile % in_group % height) * BLOCK_ROWS, tile % in_group // height * BLOCK_COLUMNS


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    matrix, rows, columns, stride, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Tile at (row, column) of ``matrix``, a descriptor (TMA) or a pointer; zeros beyond the edges."""
    if TMA:
        tile = matrix.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        pointers = matrix + i.to(tl.int64)[:, None] * stride + j[None, :]
        tile = tl.load(pointers, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(out, values, rows, columns, i, j):  # type: ignore[no-untyped-def]
    """``values`` at rows i and columns j of the contiguous (rows, columns) ``out``, rounded once to its type."""
    pointers = out + i.to(tl.int64)[:, None] * columns + j[None, :]
    tl.store(pointers, values.to(out.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def float_dot(a, b, accumulator):  # type: ignore[no-untyped-def]
    """``accumulator + a @ b`` in float32."""
    if INTERPRETED:  # which multiplies the bit patterns of bf16 (Triton 3.9)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def store_scaled(out, product, scale_a, scale_b, bias, rows, columns, i, j):  # type: ignore[no-untyped-def]
    """``((product * scale_a) * scale_b) + bias``: each step rounded to float32, in the reference's order."""
    result = product.to(tl.float32) * tl.load(scale_a + i, mask=i < rows, other=0.0)[:, None]
    if scale_b is not None:
        result = result * tl.load(scale_b + j, mask=j < columns, other=0.0)[None, :]
    if bias is not None:
        result = result + tl.load(bias + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
    store_tile(out, result, rows, columns, i, j)


@triton.jit(do_not_specialize=["M", "tokens_bucket"])
def quantised_matmul_kernel(  # type: ignore[no-untyped-def]
    a, b, scale_a, scale_b, bias, out, M, N, K, stride_a, stride_b, tokens_bucket, TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, K) @ b (N, K).T, scaled; int8 with int32 sums, float8 with float32 sums."""
    SUM: tl.constexpr = tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32
    # Hopper's float8 instruction keeps about 14 bits of a sum: after each step it goes to a float32 register
    # (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    SHORT_SUM: tl.constexpr = BLOCK_DEPTH if a.dtype.element_ty.is_fp8() else 0
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a, [M, K], [stride_a, 1], [BLOCK_ROWS, BLOCK_DEPTH])
        b_tiles = tl.make_tensor_descriptor(b, [N, K], [stride_b, 1], [BLOCK_COLUMNS, BLOCK_DEPTH])
    else:
        a_tiles = a
        b_tiles = b
    tiles = tl.cdiv(M, BLOCK_ROWS) * tl.cdiv(N, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_position(tile, M, N, BLOCK_ROWS, BLOCK_COLUMNS)
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), SUM)
        for k in range(0, K, BLOCK_DEPTH):
            x = load_tile(a_tiles, M, K, stride_a, row, k, BLOCK_ROWS, BLOCK_DEPTH, TMA)
            w = load_tile(b_tiles, N, K, stride_b, column, k, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
            product = tl.dot(x, w.T, product, max_num_imprecise_acc=SHORT_SUM, out_dtype=SUM)
        i = row + tl.arange(0, BLOCK_ROWS)
        j = column + tl.arange(0, BLOCK_COLUMNS)
        store_scaled(out, product, scale_a, scale_b, bias, M, N, i, j)


@triton.jit(do_not_specialize=["M", "tokens_bucket"])
def packed_matmul_kernel(  # type: ignore[no-untyped-def]
    a, packed, scale_a, scale_b, bias, out, M, N, K, quarter, stride_a, stride_packed, tokens_bucket,
    TMA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, K) @ unpacked.T, scaled; byte (n, j) holds the weights j, Q + j, 2Q + j and 3Q + j of row n.

    The product is computed transposed: the first operand of a tensor core may come from registers, where the weights
    are after unpacking.
    """
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a, [M, K], [stride_a, 1], [BLOCK_ROWS, BLOCK_DEPTH])
        packed_tiles = tl.make_tensor_descriptor(packed, [N, quarter], [stride_packed, 1], [BLOCK_COLUMNS, BLOCK_DEPTH])
    else:
        a_tiles = a
        packed_tiles = packed
    tiles = tl.cdiv(M, BLOCK_ROWS) * tl.cdiv(N, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_position(tile, M, N, BLOCK_ROWS, BLOCK_COLUMNS)
        product = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.int32)
        for q in range(0, quarter, BLOCK_DEPTH):
            four = load_tile(packed_tiles, N, quarter, stride_packed, column, q, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
            # Beyond the quarter the loaded activations belong to the next one, and a byte of zeros is four times -1.
            inside = (q + tl.arange(0, BLOCK_DEPTH) < quarter)[None, :]
            for i in tl.static_range(4):
                w = tl.where(inside, ((four >> (2 * i)) & 3).to(tl.int8) - 1, 0)
                x = load_tile(a_tiles, M, K, stride_a, row, i * quarter + q, BLOCK_ROWS, BLOCK_DEPTH, TMA)
                product = tl.dot(w, x.T, product, out_dtype=tl.int32)
        i = row + tl.arange(0, BLOCK_ROWS)
        j = column + tl.arange(0, BLOCK_COLUMNS)
        store_scaled(out, product.T, scale_a, scale_b, bias, M, N, i, j)


@triton.jit(do_not_specialize=["M", "tokens_bucket"])
def float_matmul_kernel(  # type: ignore[no-untyped-def]
    dy, row_scale, codes, out, M, N, K, stride_dy, stride_codes, tokens_bucket, TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (M, K) = (dy (M, N) * row_scale (N,)) @ codes (N, K), multiplied in the type of dy."""
    if TMA:
        dy_tiles = tl.make_tensor_descriptor(dy, [M, N], [stride_dy, 1], [BLOCK_ROWS, BLOCK_DEPTH])
        code_tiles = tl.make_tensor_descriptor(codes, [N, K], [stride_codes, 1], [BLOCK_DEPTH, BLOCK_COLUMNS])
    else:
        dy_tiles = dy
        code_tiles = codes
    tiles = tl.cdiv(M, BLOCK_ROWS) * tl.cdiv(K, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_position(tile, M, K, BLOCK_ROWS, BLOCK_COLUMNS)
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for n in range(0, N, BLOCK_DEPTH):
            outputs = n + tl.arange(0, BLOCK_DEPTH)
            scale = tl.load(row_scale + outputs, mask=outputs < N, other=0.0)
            g = load_tile(dy_tiles, M, N, stride_dy, row, n, BLOCK_ROWS, BLOCK_DEPTH, TMA)
            w = load_tile(code_tiles, N, K, stride_codes, n, column, BLOCK_DEPTH, BLOCK_COLUMNS, TMA)
            g = (g.to(tl.float32) * scale[None, :]).to(g.dtype)
            product = float_dot(g, w.to(tl.float32).to(g.dtype), product)
        i = row + tl.arange(0, BLOCK_ROWS)
        j = column + tl.arange(0, BLOCK_COLUMNS)
        store_tile(out, product, M, K, i, j)


def int8_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``((a @ b.T) * scale_a) * scale_b + bias``, the integer product exact, the scaling in float32 in this order.

    The forward (``b`` the weight codes, ``scale_b`` the scale of every output row) and the gradient of its input (``a``
    the codes of dY, ``b`` the transposed weight codes).

    Args:
        a: int8 (M, K).
        b: int8 (N, K).
        scale_a: float32, M values; NaN makes the row NaN.
        scale_b: float32 (N,) or None.
        bias: (N,) of any float type, or None.
        out_dtype: float32, bfloat16 or float16; rounded to it once.

    Returns:
        (M, N). Raises ValueError for a K whose products float32 cannot hold.
    """
    check_width(a)
    return _quantised_matmul(INT8, a, b, scale_a, scale_b, bias, out_dtype)


def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """``((a @ b.T) * scale_a) * scale_b`` for float8_e4m3fn a (M, K) and b (N, K), summed in float32 -> (M, N).

    The gradient of a layer's input: ``a`` is quantised dY and ``b`` the transposed weight codes. scale_a float32, M
    values; scale_b float32 (N,) or None. The instruction exists from compute capability 8.9 on.
    """
    return _quantised_matmul(FP8, a, b, scale_a, scale_b, None, out_dtype)


def _quantised_matmul(
    family: Family,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0:
        return out
    a, b = rows_contiguous(a), rows_contiguous(b)
    arguments: dict[str, Any] = {
        "a": a, "b": b, "out": out, "M": m, "N": n, "K": k, "stride_a": a.stride(0), "stride_b": b.stride(0),
        "TMA": uses_tma(a, b), **_epilogue(m, scale_a, scale_b, bias),
    }  # fmt: skip
    launch(quantised_matmul_kernel, family, persistent_grid(out, m, n), arguments)
    return out


def int8_matmul_packed(
    a: Tensor, packed: Tensor, scale_a: Tensor, scale_b: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """:func:`int8_matmul` with weights packed by ``quant.packing.pack_quarters``: uint8 (N, ceil(K / 4)).

    The weights are unpacked inside the kernel; the result is the same bit for bit.
    """
    check_width(a)
    (m, k), (n, quarter) = a.shape, packed.shape
    if quarter != triton.cdiv(k, 4):
        raise ValueError(f"{quarter} bytes a row do not hold the {k} weights that an input of width {k} meets")
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0:
        return out
    a, packed = rows_contiguous(a), rows_contiguous(packed)
    # Tiles of the activations start at multiples of the quarter.
    arguments: dict[str, Any] = {
        "a": a, "packed": packed, "out": out, "M": m, "N": n, "K": k, "quarter": quarter, "stride_a": a.stride(0),
        "stride_packed": packed.stride(0), "TMA": quarter % TMA_ALIGNMENT == 0 and uses_tma(a, packed),
        **_epilogue(m, scale_a, scale_b, bias),
    }  # fmt: skip
    launch(packed_matmul_kernel, PACKED, persistent_grid(out, m, n), arguments)
    return out


def _epilogue(m: int, scale_a: Tensor, scale_b: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
    return {
        "scale_a": scale_a.reshape(m).contiguous(),
        "scale_b": None if scale_b is None else scale_b.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "tokens_bucket": token_bucket(m),
    }


def bf16_matmul_codes(dy: Tensor, row_scale: Tensor, codes: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``(dy * row_scale) @ codes`` -> (M, K) in ``out_dtype``: the gradient of a layer's input, kept in floats.

    dy (M, N) in bfloat16, float16 or float32, row_scale float32 (N,), codes int8 (N, K). ``dy * row_scale`` is rounded
    to the type of ``dy`` and the products are summed in float32; nothing but the result is written.
    """
    (m, n), k = dy.shape, codes.shape[1]
    out = torch.empty((m, k), dtype=out_dtype, device=dy.device)
    if m == 0:
        return out
    dy, codes = rows_contiguous(dy), rows_contiguous(codes)
    family = FLOAT32 if dy.dtype is torch.float32 else FLOAT
    arguments = {
        "dy": dy, "row_scale": row_scale.contiguous(), "codes": codes, "out": out, "M": m, "N": n, "K": k,
        "stride_dy": dy.stride(0), "stride_codes": codes.stride(0), "tokens_bucket": token_bucket(m),
        "TMA": uses_tma(dy, codes),
    }  # fmt: skip
    launch(float_matmul_kernel, family, persistent_grid(out, m, k), arguments)
    return out


def _compiled_forms() -> list[Specialisation]:
    strides = {"stride_a": "i32:16", "stride_b": "i32:16"}
    forward = {"scale_a": "*fp32:16", "scale_b": "*fp32:16", "out": "*bf16:16"}
    int8 = {"a": "*i8:16", "b": "*i8:16", **strides}
    fp8 = {"a": "*fp8e4nv:16", "b": "*fp8e4nv:16", "scale_a": "*fp32:16", "out": "*bf16:16", **strides}
    bits = {"a": "*i8:16", "packed": "*u8:16", "quarter": "i32:16", "stride_a": "i32:16", "stride_packed": "i32:16"}
    dy = {"row_scale": "*fp32:16", "codes": "*i8:16", "stride_dy": "i32:16", "stride_codes": "i32:16"}
    return [
        *specialisations(quantised_matmul_kernel, INT8, {**int8, **forward}, {"bias": None}, "int8"),
        *specialisations(
            quantised_matmul_kernel, INT8, {**int8, **forward, "bias": "*fp32:16", "out": "*fp32:16"}, {}, "int8"
        ),
        *specialisations(quantised_matmul_kernel, FP8, fp8, {"scale_b": None, "bias": None}, "fp8", minimum=89),
        *specialisations(packed_matmul_kernel, PACKED, {**bits, **forward}, {"bias": None}, "int8"),
        *specialisations(float_matmul_kernel, FLOAT, {**dy, "dy": "*bf16:16", "out": "*bf16:16"}, {}, "bf16"),
        *specialisations(float_matmul_kernel, FLOAT32, {**dy, "dy": "*fp32:16", "out": "*fp32:16"}, {}, None),
    ]


SPECIALISATIONS = _compiled_forms()
