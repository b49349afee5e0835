"""Four codes a byte: in the row-interleaved layout that ``transformers`` reads, and in the one that kernels read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.quant.spec import CODES_PER_BYTE


def code_digits(codes: Tensor) -> Tensor:
    """Codes + 1 as uint8, in the shape of int8 ``codes``. Raises ValueError for codes outside {-1, 0, 1}."""
    if codes.numel() and not bool(((codes == -1) | (codes == 0) | (codes == 1)).all()):
        raise ValueError("codes outside {-1, 0, 1} fit neither two bits nor a ternary digit")
    return (codes + 1).to(torch.uint8)


def digit_codes(digits: Tensor) -> Tensor:
    """The inverse of :func:`code_digits`. Raises ValueError for a digit above 2, which no packer writes."""
    if digits.numel() and int(digits.max()) > 2:
        raise ValueError("the packed weights hold a code outside {-1, 0, 1}: the file is damaged")
    return digits.to(torch.int8) - 1


def pack_2bit(codes: Tensor) -> Tensor:
    """Ternary or binary int8 codes (out, in) to uint8 (out / 4, in); the input is left as it is.

    With ``R = out / 4``: ``packed[r, c] = sum_i (codes[i * R + r, c] + 1) << (2 * i)``
    (transformers, integrations/bitnet.py, pack_weights). Raises ConfigError when out is no multiple of 4 and
    ValueError for codes outside {-1, 0, 1}.
    """
    rows = codes.shape[0]
    if rows % CODES_PER_BYTE:
        raise ConfigError(f"2-bit packing needs a multiple of {CODES_PER_BYTE} output rows, this layer has {rows}.")
    shifted = code_digits(codes).reshape(CODES_PER_BYTE, rows // CODES_PER_BYTE, -1)
    packed = shifted[0].clone()
    for i in range(1, CODES_PER_BYTE):
        packed |= shifted[i] << (2 * i)
    return packed


def unpack_2bit(packed: Tensor) -> Tensor:
    """uint8 (out / 4, in) to int8 codes (out, in): the inverse of :func:`pack_2bit`.

    Raises ValueError when a byte holds the unused fourth code, which no packer writes.
    """
    parts = [(packed >> (2 * i)) & 3 for i in range(CODES_PER_BYTE)]
    return digit_codes(torch.cat(parts, dim=0))


def pack_quarters(codes: Tensor) -> Tensor:
    """Ternary or binary int8 codes (N, K), any N and K, to uint8 (N, Q) with ``Q = ceil(K / 4)``, for kernels.

    ``packed[n, j] = sum_i (codes[n, i * Q + j] + 1) << (2 * i)``: a run of bytes holds a run of columns of each of the
    four quarters of a row, so that a matmul unpacks it without moving codes between lanes. Columns from K on count as
    code 0. Codes outside {-1, 0, 1} are not looked for.
    """
    quarter = -(-codes.shape[1] // CODES_PER_BYTE)
    padded = F.pad(codes, (0, CODES_PER_BYTE * quarter - codes.shape[1]))
    packed = torch.zeros((codes.shape[0], quarter), dtype=torch.uint8, device=codes.device)
    for i in range(CODES_PER_BYTE):
        packed |= (padded[:, i * quarter : (i + 1) * quarter] + 1).to(torch.uint8) << (2 * i)
    return packed


def unpack_quarters(packed: Tensor, columns: int) -> Tensor:
    """uint8 (N, Q) to int8 codes (N, ``columns``): the inverse of :func:`pack_quarters`."""
    parts = [(packed >> (2 * i)) & 3 for i in range(CODES_PER_BYTE)]
    return (torch.cat(parts, dim=1).to(torch.int8) - 1)[:, :columns]
