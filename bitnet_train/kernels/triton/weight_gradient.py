"""Gradients of the weights: products that contract over the tokens, with the input dequantised inside the kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_train.kernels.triton.matmul import float_dot, load_tile, store_tile, tile_position
from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.kernels.triton.tuning import (
    BLOCK_WEIGHT,
    FLOAT32,
    WEIGHT,
    launch,
    multiprocessors,
    rows_contiguous,
    specialisations,
    token_bucket,
    uses_tma,
)
from bitnet_train.quant.gradients import BLOCK_TOKENS

# A part of the tokens must be worth the float32 result that it writes and that is read again.
SMALLEST_PART = 2048
MOST_PARTS = 8
TRANSPOSED_TOKENS = 128
TRANSPOSED_COLUMNS = 64


@triton.jit(do_not_specialize=["M", "tokens_bucket"])
def weight_gradient_kernel(  # type: ignore[no-untyped-def]
    dy, codes_x, scale_x, out, M, N, K, stride_dy, stride_x, part_tokens, tokens_bucket, DTYPE: tl.constexpr,
    TMA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[part] (N, K) = dy (M, N).T @ (codes_x (M, K) * scale_x (M,)) over the part's tokens, operands in DTYPE."""
    if TMA:
        dy_tiles = tl.make_tensor_descriptor(dy, [M, N], [stride_dy, 1], [BLOCK_DEPTH, BLOCK_ROWS])
        x_tiles = tl.make_tensor_descriptor(codes_x, [M, K], [stride_x, 1], [BLOCK_DEPTH, BLOCK_COLUMNS])
    else:
        dy_tiles = dy
        x_tiles = codes_x
    part = tl.program_id(1)
    # A part is a multiple of the depth, so that only the last one ends within a step: there rows past M read as zeros.
    first = part * part_tokens
    row, column = tile_position(tl.program_id(0), N, K, BLOCK_ROWS, BLOCK_COLUMNS)
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for m in range(first, min(first + part_tokens, M), BLOCK_DEPTH):
        tokens = m + tl.arange(0, BLOCK_DEPTH)
        scale = tl.load(scale_x + tokens, mask=tokens < M, other=0.0)
        g = load_tile(dy_tiles, M, N, stride_dy, m, row, BLOCK_DEPTH, BLOCK_ROWS, TMA)
        x = load_tile(x_tiles, M, K, stride_x, m, column, BLOCK_DEPTH, BLOCK_COLUMNS, TMA)
        x_hat = (x.to(tl.float32) * scale[:, None]).to(DTYPE)
        product = float_dot(g.to(DTYPE).T, x_hat, product)
    i = row + tl.arange(0, BLOCK_ROWS)
    j = column + tl.arange(0, BLOCK_COLUMNS)
    store_tile(out + part.to(tl.int64) * N * K, product, N, K, i, j)


@triton.jit
def transpose_codes_kernel(  # type: ignore[no-untyped-def]
    codes, out, M, columns, stride, padded, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """out (columns, padded) = codes (M, columns).T, zeros from M on."""
    tokens = tl.program_id(0) * BLOCK_TOKENS
    column = tl.program_id(1) * BLOCK_COLUMNS
    tile = load_tile(codes, M, columns, stride, tokens, column, BLOCK_TOKENS, BLOCK_COLUMNS, False)
    i = column + tl.arange(0, BLOCK_COLUMNS)
    store_tile(out, tile.T, columns, padded, i, tokens + tl.arange(0, BLOCK_TOKENS))


@triton.jit(do_not_specialize=["tokens_bucket"])
def block_weight_gradient_kernel(  # type: ignore[no-untyped-def]
    codes_dy, scale, codes_x, out, M, N, K, stride_dy, stride_x, tokens_bucket, TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (N, K) = sum over blocks b of scale[b, :, None] * (codes_dy (N, M) @ codes_x (K, M).T of the block)."""
    if TMA:
        dy_tiles = tl.make_tensor_descriptor(codes_dy, [N, M], [stride_dy, 1], [BLOCK_ROWS, BLOCK_DEPTH])
        x_tiles = tl.make_tensor_descriptor(codes_x, [K, M], [stride_x, 1], [BLOCK_COLUMNS, BLOCK_DEPTH])
    else:
        dy_tiles = codes_dy
        x_tiles = codes_x
    row, column = tile_position(tl.program_id(0), N, K, BLOCK_ROWS, BLOCK_COLUMNS)
    i = row + tl.arange(0, BLOCK_ROWS)
    j = column + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for block in range(tl.cdiv(M, BLOCK_DEPTH)):
        m = block * BLOCK_DEPTH
        row_scale = tl.load(scale + tl.cast(block, tl.int64) * N + i, mask=i < N, other=0.0)
        g = load_tile(dy_tiles, N, M, stride_dy, row, m, BLOCK_ROWS, BLOCK_DEPTH, TMA)
        x = load_tile(x_tiles, K, M, stride_x, column, m, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
        total += tl.dot(g, x.T, out_dtype=tl.int32).to(tl.float32) * row_scale[:, None]
    store_tile(out, total, N, K, i, j)


def weight_gradient(dy: Tensor, codes_x: Tensor, scale_x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dy.T @ (codes_x * scale_x)``, both operands rounded to ``dtype``, summed in float32 -> float32 (N, K).

    dy (M, N) of any float type, codes_x int8 (M, K), scale_x float32, M values; dtype bfloat16, float16 or float32.
    The dequantised input exists only inside the kernel. When the result has too few tiles to occupy the GPU, the tokens
    are cut into parts whose results are summed: always in the same order, so that equal inputs give equal bits.
    """
    (m, n), k = dy.shape, codes_x.shape[1]
    if m == 0:
        return torch.zeros((n, k), dtype=torch.float32, device=dy.device)
    dy, codes_x = rows_contiguous(dy), rows_contiguous(codes_x)
    parts = token_parts(m, n, k, multiprocessors(dy))
    part_tokens = triton.cdiv(triton.cdiv(m, parts), BLOCK_TOKENS) * BLOCK_TOKENS
    parts = triton.cdiv(m, part_tokens)
    out = torch.empty((parts, n, k), dtype=torch.float32, device=dy.device)
    arguments = {
        "dy": dy, "codes_x": codes_x, "scale_x": scale_x.reshape(m).contiguous(), "out": out, "M": m, "N": n, "K": k,
        "stride_dy": dy.stride(0), "stride_x": codes_x.stride(0), "part_tokens": part_tokens,
        "tokens_bucket": token_bucket(m), "DTYPE": TRITON_TYPES[dtype], "TMA": uses_tma(dy, codes_x),
    }  # fmt: skip
    family = FLOAT32 if dtype is torch.float32 else WEIGHT
    launch(weight_gradient_kernel, family, lambda meta: (_tiles(n, k, meta), parts), arguments)
    return out[0] if parts == 1 else out.sum(0)


TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def token_parts(m: int, n: int, k: int, processors: int) -> int:
    """Into how many parts to cut M tokens, so that the last wave of tiles of an (N, K) result is well filled."""
    tiles = triton.cdiv(n, 128) * triton.cdiv(k, 128)
    if tiles >= 2 * processors:
        return 1
    possible = range(1, max(1, min(MOST_PARTS, m // SMALLEST_PART)) + 1)
    # Time in units of one tile over all tokens; a part costs the traffic of its result besides.
    return min(possible, key=lambda parts: triton.cdiv(tiles * parts, processors) / parts * (1 + 0.02 * parts))


def transpose_codes(codes: Tensor) -> Tensor:
    """int8 codes (M, C) to (C, M'), M' the next multiple of 128, zeros from M on."""
    m, columns = codes.shape
    codes = rows_contiguous(codes)
    padded = triton.cdiv(m, TRANSPOSED_TOKENS) * TRANSPOSED_TOKENS
    out = torch.empty((columns, padded), dtype=torch.int8, device=codes.device)
    if m:
        grid = (padded // TRANSPOSED_TOKENS, triton.cdiv(columns, TRANSPOSED_COLUMNS))
        with torch.cuda.device_of(out):
            transpose_codes_kernel[grid](
                codes, out, m, columns, codes.stride(0), padded, BLOCK_TOKENS=TRANSPOSED_TOKENS,
                BLOCK_COLUMNS=TRANSPOSED_COLUMNS,
            )  # fmt: skip
    return out


def block_weight_gradient(codes_dy: Tensor, scale: Tensor, codes_x: Tensor) -> Tensor:
    """``sum_b scale[b, :, None] * (codes_dy_b.T @ codes_x_b)`` over blocks of 128 tokens -> float32 (N, K).

    ``quant.gradients.block_weight_gradient``, bit for bit. codes_dy int8 (M, N), scale float32 (ceil(M / 128), N),
    codes_x int8 (M, K). Integer tensor cores contract along contiguous elements, here the tokens: codes are transposed
    first, unless they are a view of a (columns, M) tensor.
    """
    (m, n), k = codes_dy.shape, codes_x.shape[1]
    if m == 0:
        return torch.zeros((n, k), dtype=torch.float32, device=codes_dy.device)
    by_output, by_input = (
        codes.t() if codes.stride(0) == 1 and m > 1 else transpose_codes(codes) for codes in (codes_dy, codes_x)
    )
    out = torch.empty((n, k), dtype=torch.float32, device=codes_dy.device)
    arguments = {
        "codes_dy": by_output, "scale": scale.contiguous(), "codes_x": by_input, "out": out,
        # Tokens up to the padding are zeros on one side at least; a multiple of 16 lets the loads be wide.
        "M": min(by_output.shape[1], by_input.shape[1]), "N": n, "K": k, "stride_dy": by_output.stride(0),
        "stride_x": by_input.stride(0), "tokens_bucket": token_bucket(m), "TMA": uses_tma(by_output, by_input),
    }  # fmt: skip
    launch(block_weight_gradient_kernel, BLOCK_WEIGHT, lambda meta: (_tiles(n, k, meta),), arguments)
    return out


def _tiles(rows: int, columns: int, meta: dict[str, Any]) -> int:
    return int(triton.cdiv(rows, meta["BLOCK_ROWS"]) * triton.cdiv(columns, meta["BLOCK_COLUMNS"]))


def _compiled_forms() -> list[Specialisation]:
    codes = {"codes_x": "*i8:16", "stride_x": "i32:16", "stride_dy": "i32:16", "out": "*fp32:16"}
    floats = {**codes, "scale_x": "*fp32:16", "part_tokens": "i32:16"}
    blocks = {**codes, "codes_dy": "*i8:16", "scale": "*fp32:16", "M": "i32:16"}
    transposed = {"codes": "*i8:16", "out": "*i8:16", "M": "i32", "columns": "i32:16", "stride": "i32:16"}
    return [
        *specialisations(weight_gradient_kernel, WEIGHT, {**floats, "dy": "*bf16:16"}, {"DTYPE": tl.bfloat16}, "bf16"),
        *specialisations(weight_gradient_kernel, FLOAT32, {**floats, "dy": "*fp32:16"}, {"DTYPE": tl.float32}, None),
        *specialisations(block_weight_gradient_kernel, BLOCK_WEIGHT, blocks, {}, "int8"),
        Specialisation(
            kernel=transpose_codes_kernel,
            signature={**transposed, "padded": "i32:16"},
            constants={"BLOCK_TOKENS": TRANSPOSED_TOKENS, "BLOCK_COLUMNS": TRANSPOSED_COLUMNS},
            num_warps=4,
            num_stages=1,
        ),
    ]


SPECIALISATIONS = _compiled_forms()
