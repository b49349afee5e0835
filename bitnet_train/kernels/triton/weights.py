# mypy: allow-untyped-defs
"""Master weights to codes, transposed codes and scales, written into buffers that are there already.

The arithmetic is that of :mod:`bitnet_train.quant.weights`. Nothing here waits for the device: scales stay on it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.quant.spec import CODES_PER_BYTE
from bitnet_train.quant.weights import SCALE_FLOOR

FLOOR = tl.constexpr(SCALE_FLOOR)
# Codes -1 and 1 as bit patterns of float8_e4m3fn, written as bytes so that no float8 hardware is needed.
FLOAT8_MINUS_ONE = tl.constexpr(-72)  # 0xB8
FLOAT8_ONE = tl.constexpr(0x38)

# Each program of the sum takes so many elements, SUM_BLOCK at a time; a second kernel adds the programs' sums.
SUM_CHUNK = 32768
SUM_BLOCK = 2048
SUM_WARPS = 8
# Codes are made in tiles of ROWS x COLUMNS: 64 and more contiguous bytes on either side of the transposition.
TILE_ROWS = 128
TILE_COLUMNS = 64
TILE_WARPS = 8
PACK_BLOCK = 1024


@triton.jit
def sum_kernel(weight, partial, group_size, chunks, MAGNITUDES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Program ``group * chunks + chunk``: float64 sum of the chunk's elements, or of their magnitudes."""
    program = tl.program_id(0)
    group = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * CHUNK
    weight += group * group_size + first
    left = tl.minimum(group_size - first, CHUNK).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(weight + at, mask=at < left, other=0.0).to(tl.float32)
        if MAGNITUDES:
            value = tl.abs(value)
        total += value.to(tl.float64)
    tl.store(partial + program, tl.sum(total, axis=0))


@triton.jit
def mean_kernel(partial, mean, group_size, chunks, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):
    """Of one group: the sum of its chunks' sums over ``group_size``, rounded once to float32."""
    group = tl.program_id(0).to(tl.int64)
    partial += group * chunks
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < chunks, other=0.0)
    # `/` of float64 is the IEEE division; only float32 has an approximate one.
    result = (tl.sum(total, axis=0) / tl.cast(group_size, tl.float64)).to(tl.float32)
    if CLAMPED:
        result = tl.where(result < FLOOR, FLOOR, result)  # unlike a maximum, keeps NaN
    tl.store(mean + group, result)


def group_means(weight: Tensor, groups: int, magnitudes: bool) -> Tensor:
    """float32 (groups,): mean of each group of rows of ``weight`` (N, K), or of its magnitudes, clamped at 1e-5."""
    weight = weight.detach().contiguous()
    group_size = weight.numel() // groups
    chunks = triton.cdiv(group_size, SUM_CHUNK)
    partial = torch.empty(groups * chunks, dtype=torch.float64, device=weight.device)
    means = torch.empty(groups, dtype=torch.float32, device=weight.device)
    # A group of a row or two is one short chunk.
    chunk = min(SUM_CHUNK, max(SUM_BLOCK, triton.next_power_of_2(group_size)))
    block = min(1024, max(128, triton.next_power_of_2(chunks)))
    options = {"num_stages": 1, "enable_fp_fusion": False}
    with torch.cuda.device_of(weight):
        sum_kernel[(groups * chunks,)](
            weight, partial, group_size, chunks, magnitudes, chunk, SUM_BLOCK, num_warps=SUM_WARPS, **options
        )
        mean_kernel[(groups,)](partial, means, group_size, chunks, magnitudes, block, num_warps=4, **options)
    return means


def absmean_scale(weight: Tensor, groups: int) -> Tensor:
    """Mean of ``|W|`` per group of rows of weight (N, K), float32 (groups,), clamped at 1e-5.

    Summed in float64 in an order that depends on the shape alone, and rounded once. A NaN or infinite weight makes its
    group's scale NaN or infinite. ``groups`` divides N.
    """
    return group_means(weight, groups, magnitudes=True)


@triton.jit
def weight_codes_kernel(
    weight, level, codes, codes_t, rows, columns, group_rows, threshold,
    weight_stride, codes_stride, codes_t_stride,
    BINARY: tl.constexpr, FLOAT8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of codes, and its transposition. ``level``: a group's scale, or its mean where BINARY."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    group = row // group_rows
    row = row.to(tl.int64)
    column = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(weight + row * weight_stride + column, mask=inside, other=0.0).to(tl.float32)
    of_group = tl.load(level + group, mask=row < rows, other=1.0)
    if BINARY:
        code = tl.where(value >= of_group, 1, -1).to(tl.int8)
    else:
        ratio = tl.div_rn(value, of_group)
        code = (ratio > threshold).to(tl.int8) - (ratio < -threshold).to(tl.int8)
    tl.store(codes + row * codes_stride + column, code, mask=inside)
    if codes_t is not None:
        if FLOAT8:
            code = tl.where(code > 0, FLOAT8_ONE, tl.where(code < 0, FLOAT8_MINUS_ONE, 0)).to(tl.int8)
        # The offsets are transposed with the tile, which lets the compiler lay the store out along the rows of codes_t.
        offset = tl.trans(column.to(tl.int64) * codes_t_stride + row)
        tl.store(codes_t + offset, tl.trans(code), mask=tl.trans(inside))


def write_codes(
    weight: Tensor, level: Tensor, threshold: float, codes: Tensor, codes_t: Tensor | None, binary: bool
) -> None:
    """Launches :func:`weight_codes_kernel`."""
    rows, columns = weight.shape
    weight = weight.detach()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    for target, shape in ((codes, (rows, columns)), (codes_t, (columns, rows))):
        if target is not None and (target.shape != shape or (target.stride(1) != 1 and shape[1] != 1)):
            raise ValueError(f"codes are written to {shape} with contiguous rows, not to {tuple(target.shape)}")
    float8 = codes_t is not None and codes_t.dtype is torch.float8_e4m3fn
    as_bytes = None if codes_t is None else codes_t.view(torch.int8)
    grid = (triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, TILE_COLUMNS),)
    with torch.cuda.device_of(weight):
        weight_codes_kernel[grid](
            weight, level, codes, as_bytes, rows, columns, rows // level.shape[0], threshold,
            weight.stride(0), codes.stride(0), 0 if as_bytes is None else as_bytes.stride(0),
            binary, float8, TILE_ROWS, TILE_COLUMNS, num_warps=TILE_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def ternarise_into(
    weight: Tensor, scale: Tensor, threshold: float, codes: Tensor, codes_t: Tensor | None = None
) -> None:
    """Ternary codes of a master weight, written in place; :func:`bitnet_train.quant.weights.ternarise`.

    Args:
        weight: (N, K), float32, bfloat16 or float16, rows any distance apart.
        scale: float32 (groups,) from :func:`absmean_scale`; a group is N / groups rows.
        threshold: of ``|W| / scale``, above which a code is not 0.
        codes: int8 (N, K), written; may be rows of a taller stack.
        codes_t: (K, N), int8 or float8_e4m3fn, written with the transposed codes; may be columns of a wider stack.

    Raises ValueError where ``codes`` or ``codes_t`` has another shape or elements of a row that are not contiguous.
    """
    write_codes(weight, scale, threshold, codes, codes_t, binary=False)


def binarise_into(weight: Tensor, groups: int, codes: Tensor, codes_t: Tensor | None = None) -> Tensor:
    """Binary codes of a master weight, written in place; :func:`bitnet_train.quant.weights.binarise`.

    Arguments as of :func:`ternarise_into`. Returns the scale float32 (groups,).
    """
    write_codes(weight, group_means(weight, groups, magnitudes=False), 0.0, codes, codes_t, binary=True)
    return absmean_scale(weight, groups)


@triton.jit
def pack_kernel(codes, packed, columns, quarter, codes_stride, packed_stride, BLOCK: tl.constexpr):
    """BLOCK bytes of one row."""
    blocks = tl.cdiv(quarter, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    codes += row * codes_stride
    byte = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(4):
        column = i * quarter + at
        code = tl.load(codes + column, mask=(at < quarter) & (column < columns), other=0).to(tl.int32)
        byte |= (code + 1) << (2 * i)
    tl.store(packed + row * packed_stride + at, byte.to(tl.uint8), mask=at < quarter)


def pack_into(codes: Tensor, packed: Tensor) -> None:
    """Four codes a byte: :func:`bitnet_train.quant.packing.pack_quarters` of codes int8 (N, K), in {-1, 0, 1} (not
    checked), into packed uint8 (N, ceil(K / 4)). Rows of either may be any distance apart.

    Raises ValueError for a ``packed`` of another width, or where the elements of its rows are not contiguous.
    """
    rows, columns = codes.shape
    quarter = triton.cdiv(columns, CODES_PER_BYTE)
    if packed.shape != (rows, quarter) or (packed.stride(1) != 1 and quarter != 1):
        raise ValueError(f"packed must be ({rows}, {quarter}) with contiguous rows, not {tuple(packed.shape)}")
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    grid = (rows * triton.cdiv(quarter, PACK_BLOCK),)
    with torch.cuda.device_of(codes):
        pack_kernel[grid](codes, packed, columns, quarter, codes.stride(0), packed.stride(0), PACK_BLOCK,
                          num_warps=4, num_stages=1, enable_fp_fusion=False)  # fmt: skip


def _specialisations() -> list[Specialisation]:
    """Sums of matrices and of single rows, codes from each type of master with each kind of transposition, packing."""
    found = []
    sizes = {"group_size": "i32:16", "chunks": "i32"}
    for weight in ("*fp32:16", "*bf16:16"):
        for chunk in (SUM_BLOCK, SUM_CHUNK):
            signature = {"weight": weight, "partial": "*fp64:16"} | sizes
            constants: dict[str, object] = {"MAGNITUDES": True, "CHUNK": chunk, "BLOCK": SUM_BLOCK}
            found.append(Specialisation(sum_kernel, signature, constants, SUM_WARPS, 1, quantiser=True))
    for block in (128, 1024):
        signature = {"partial": "*fp64:16", "mean": "*fp32:16"} | sizes
        found.append(Specialisation(mean_kernel, signature, {"CLAMPED": True, "BLOCK": block}, 4, 1, quantiser=True))
    strides = dict.fromkeys(("weight_stride", "codes_stride"), "i32:16")
    shape = {"rows": "i32:16", "columns": "i32:16", "group_rows": "i32:16", "threshold": "fp32"}
    pointers = {"level": "*fp32:16", "codes": "*i8:16"}
    for weight in ("*fp32:16", "*bf16:16"):
        for transposed, float8, binary in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (True, False, True),
        ):
            signature = {"weight": weight} | pointers | shape | strides
            constants = {"BINARY": binary, "FLOAT8": float8, "ROWS": TILE_ROWS, "COLUMNS": TILE_COLUMNS}
            if transposed:
                signature |= {"codes_t": "*i8:16", "codes_t_stride": "i32:16"}
            else:
                signature["codes_t_stride"] = "i32"
                constants["codes_t"] = None
            found.append(Specialisation(weight_codes_kernel, signature, constants, TILE_WARPS, 1, quantiser=True))
    signature = {"codes": "*i8:16", "packed": "*u8:16", "columns": "i32:16", "quarter": "i32:16",
                 "codes_stride": "i32:16", "packed_stride": "i32:16"}  # fmt: skip
    found.append(Specialisation(pack_kernel, signature, {"BLOCK": PACK_BLOCK}, 4, 1))
    return found


SPECIALISATIONS = _specialisations()
