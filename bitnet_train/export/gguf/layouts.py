"""Byte layouts of ternary weights in GGUF files: TQ1_0 and TQ2_0 of llama.cpp, I2_S of bitnet.cpp; and Q6_K.

All functions take codes as they are: nothing is re-quantised. The layouts are those of ggml-quants.c (llama.cpp) and of
ggml-bitnet-mad.cpp (microsoft/BitNet, x86), written down from their behaviour.
"""

import torch
from torch import Tensor

from bitnet_train.export.gguf.blocks import BLOCK, I2_S_TAIL, TQ1_0_BYTES, TQ2_0_BYTES
from bitnet_train.quant.packing import code_digits, digit_codes

# TQ1_0: the codes of a block go into 32, 16 and 4 bytes of five, five and four ternary digits: (digits, bytes), digits
# of a byte as many weights apart as there are bytes.
TQ1_0_PARTS = ((5, 32), (5, 16), (4, 4))


def pack_tq2_0(codes: Tensor, row_scale: Tensor) -> Tensor:
    """Codes int8 (N, K), K a multiple of 256, and one scale per row float32 (N,) to uint8 (N, K / 256 * 66).

    A block is 64 bytes of codes + 1, two bits each, and the scale as float16. Byte j of a half block holds its weights
    j, 32 + j, 64 + j and 96 + j, from the low bits up.
    """
    rows, columns = codes.shape
    parts = code_digits(codes).reshape(rows, columns // BLOCK, 2, 4, 32)
    packed = parts[..., 0, :].clone()
    for i in range(1, 4):
        packed |= parts[..., i, :] << (2 * i)
    return _with_scales(packed.reshape(rows, columns // BLOCK, 64), row_scale)


def unpack_tq2_0(packed: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, K / 256 * 66) to codes int8 (N, K), scales float32 (N, K / 256). Raises ValueError."""
    blocks, scales = _without_scales(packed, columns, TQ2_0_BYTES)
    halves = blocks.reshape(*blocks.shape[:2], 2, 1, 32)
    digits = (halves >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3
    return digit_codes(digits.reshape(packed.shape[0], columns)), scales


def pack_tq1_0(codes: Tensor, row_scale: Tensor) -> Tensor:
    """Codes int8 (N, K), K a multiple of 256, and one scale per row float32 (N,) to uint8 (N, K / 256 * 54).

    A byte holds five ternary digits (the last four bytes of a block four), the first the most significant, as the
    fraction ``ceil(256 * digits / 243)``, from which a multiplication by 3 takes the next digit out of the top bits.
    """
    rows, columns = codes.shape
    digits = code_digits(codes).reshape(rows, columns // BLOCK, BLOCK).int()
    packed, first = [], 0
    for count, stride in TQ1_0_PARTS:
        part = digits[..., first : first + count * stride].reshape(rows, columns // BLOCK, count, stride)
        powers = torch.tensor([3 ** (4 - i) for i in range(count)], dtype=torch.int32)[:, None]
        value = (part * powers).sum(-2)
        packed.append(((value * 256 + 242) // 243).to(torch.uint8))
        first += count * stride
    return _with_scales(torch.cat(packed, dim=-1), row_scale)


def unpack_tq1_0(packed: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, K / 256 * 54) to codes int8 (N, K) and scales float32 (N, K / 256)."""
    blocks, scales = _without_scales(packed, columns, TQ1_0_BYTES)
    digits, first = [], 0
    for count, stride in TQ1_0_PARTS:
        stored = blocks[..., None, first : first + stride]
        powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8)[:, None]
        digits.append((((stored * powers).int() * 3) >> 8).flatten(2))
        first += stride
    return digit_codes(torch.cat(digits, dim=-1).reshape(packed.shape[0], columns)), scales


def pack_i2_s(codes: Tensor, scale: float) -> Tensor:
    """Codes int8 (N, K), K a multiple of 128, and their one scale to uint8 (N * K / 4 + 32,).

    Weight j of 128 goes into byte j % 32, shifted left by ``6 - 2 * (j // 32)``: the opposite order of TQ2_0. The
    float32 scale follows all codes, padded with zeros to 32 bytes.
    """
    parts = code_digits(codes).reshape(-1, 4, 32)
    packed = parts[:, 3].clone()
    for i in range(3):
        packed |= parts[:, i] << (6 - 2 * i)
    tail = torch.zeros(I2_S_TAIL, dtype=torch.uint8)
    tail[:4] = torch.tensor([scale], dtype=torch.float32).view(torch.uint8)
    return torch.cat([packed.flatten(), tail])


def unpack_i2_s(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, float]:
    """uint8 (N * K / 4 + 32,) to codes int8 (N, K) and the scale. Raises ValueError for a bad code."""
    quarters = packed[: rows * columns // 4].reshape(-1, 1, 32)
    digits = (quarters >> torch.tensor([6, 4, 2, 0], dtype=torch.uint8)[:, None]) & 3
    scale = packed[rows * columns // 4 :][:4].clone().view(torch.float32)
    return digit_codes(digits.reshape(rows, columns)), float(scale)


def pack_q6_k(values: Tensor) -> Tensor:
    """Float values (N, K), K a multiple of 256, to uint8 (N, K / 256 * 210): 6-bit codes, 16 scales of 8 bits a block.

    The scale of 16 weights is, of nine around ``-extreme / 32``, the one with the least error weighted by the squared
    value (as llama.cpp's quantiser weighs).
    """
    rows, columns = values.shape
    x = values.float().reshape(rows, columns // BLOCK, 16, 16)
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best_error, best = torch.full_like(extreme, torch.inf), torch.zeros_like(extreme)
    for shift in range(-4, 5):
        inverse = torch.where(extreme == 0, 0, -(32 + 0.1 * shift) / extreme)
        q = torch.round(x * inverse).clamp(-32, 31)
        weight = x * x
        norm = (weight * q * q).sum(-1, keepdim=True)
        scale = torch.where(norm > 0, (weight * x * q).sum(-1, keepdim=True) / norm, 0)
        error = (weight * (x - scale * q).square()).sum(-1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    largest = best.gather(2, best.abs().argmax(2, keepdim=True))
    d = (largest / -128).half().float()
    scales = torch.where(d == 0, 0, torch.round(best / d)).clamp(-128, 127)
    step = d * scales
    q = (torch.where(step == 0, 0, torch.round(x / step)).clamp(-32, 31) + 32).to(torch.uint8)
    q = q.reshape(rows, -1, 2, 4, 32)
    low = torch.stack(
        [(q[..., 0, :] & 15) | ((q[..., 2, :] & 15) << 4), (q[..., 1, :] & 15) | ((q[..., 3, :] & 15) << 4)], -2
    )
    high = sum(((q[..., i, :] >> 4) << (2 * i) for i in range(1, 4)), q[..., 0, :] >> 4)
    parts = [
        low.reshape(rows, -1, 128),
        high.reshape(rows, -1, 64),
        scales.reshape(rows, -1, 16).to(torch.int8).view(torch.uint8),
        d.reshape(rows, -1, 1).half().view(torch.uint8),
    ]
    return torch.cat(parts, dim=-1).reshape(rows, -1)


def _with_scales(blocks: Tensor, row_scale: Tensor) -> Tensor:
    """Blocks uint8 (N, blocks, bytes), each followed by its row's scale as float16, flattened to rows."""
    scales = row_scale.half()[:, None, None].expand(-1, blocks.shape[1], 1).contiguous().view(torch.uint8)
    return torch.cat([blocks, scales], dim=-1).flatten(1)


def _without_scales(packed: Tensor, columns: int, block_bytes: int) -> tuple[Tensor, Tensor]:
    blocks = packed.reshape(packed.shape[0], columns // BLOCK, block_bytes)
    return blocks[..., :-2], blocks[..., -2:].contiguous().view(torch.float16)[..., 0].float()
