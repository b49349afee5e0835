"""Byte layouts of codes in the format ``packed``: two bits each, or five ternary digits in a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.export.config import Packing
from bitnet_train.quant.packing import code_digits, digit_codes

# Codes in a byte.
PER_BYTE = {Packing.two_bit: 4, Packing.base3: 5}
# What a digit is worth, from one code of the byte to the next.
RADIX = {Packing.two_bit: 4, Packing.base3: 3}


def packed_bytes(count: int, packing: Packing) -> int:
    """Bytes that ``count`` codes take."""
    return -(-count // PER_BYTE[packing])


def pack_codes(codes: Tensor, packing: Packing) -> Tensor:
    """Codes int8 of any shape, in row-major order, to uint8 (bytes,): ``sum_i (code_i + 1) * radix^i`` for each byte.

    The last byte is filled up with codes 0. Raises ValueError for codes outside {-1, 0, 1}.
    """
    per_byte, radix = PER_BYTE[packing], RADIX[packing]
    digits = code_digits(F.pad(codes.flatten(), (0, -codes.numel() % per_byte))).reshape(-1, per_byte)
    packed = torch.zeros(len(digits), dtype=torch.uint8)
    for i in range(per_byte):
        packed += digits[:, i] * radix**i
    return packed


def unpack_codes(packed: Tensor, shape: tuple[int, ...], packing: Packing) -> Tensor:
    """uint8 (bytes,) to codes int8 of ``shape``. Raises ValueError for a byte that no packer writes."""
    per_byte, radix = PER_BYTE[packing], RADIX[packing]
    if packing is Packing.base3 and packed.numel() and int(packed.max()) >= radix**per_byte:
        raise ValueError("the packed weights hold a code outside {-1, 0, 1}: the file is damaged")
    digits = torch.stack([packed // radix**i % radix for i in range(per_byte)], dim=1)
    return digit_codes(digits.flatten()[: torch.Size(shape).numel()]).reshape(shape)
