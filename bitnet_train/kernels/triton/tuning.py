"""Tile sizes of the matmul kernels as plain data, what of them fits a GPU, and how a kernel is launched with them.

The same lists and the same pruning serve the autotuner at run time and the ahead-of-time check without a GPU.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bitnet_train.kernels.triton.specialisation import Specialisation

KIB = 1024

# Shared memory that one block may use (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_MEMORY = {
    80: 163 * KIB, 86: 99 * KIB, 87: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB,
    100: 227 * KIB, 103: 227 * KIB, 110: 227 * KIB, 120: 99 * KIB, 121: 99 * KIB,
}  # fmt: skip
# Tensor cores that read operands from shared memory (wgmma, tcgen05) leave registers for larger tiles. Consumer
# Blackwell (12.x) has mma.sync, as Ampere has.
HOPPER = (9,)
HOPPER_AND_BLACKWELL = (9, 10, 11)
LARGEST_SHARE = 32 * 256  # bytes of a result per warp, beyond which such a kernel spills registers (seen when compiled)
TMA_SINCE = 90  # the tensor memory accelerator: whole tiles copied by one instruction
TMA_ALIGNMENT = 16  # bytes, of the first element and of the row stride
SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Tile:
    """One way to cut a matmul: a block of the result and the depth of one step along the contraction."""

    rows: int  # of the first operand
    columns: int  # rows of the second operand
    depth: int  # elements of the contraction a step
    warps: int
    stages: int  # steps in flight
    generations: tuple[int, ...] = ()  # first digits of the compute capabilities with registers for it; () for all
    flatten: bool = False  # the first steps of the next tile load while a result is written

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_DEPTH": self.depth,
            "FLATTEN": self.flatten,
        }


@dataclass(frozen=True)
class Family:
    """What a kernel is tuned over, and the shared memory that its tiles take."""

    tiles: tuple[Tile, ...]
    # Bytes that one element along the contraction takes in shared memory: of a row and of a column of the tile, for
    # every step in flight; and once for operands that are converted on the way to the tensor cores.
    step_bytes: tuple[float, float]
    converted_bytes: tuple[float, float] = (0.0, 0.0)
    rows_are_tokens: bool = True
    interpreted: Tile = Tile(16, 16, 32, 4, 1)  # small: tests reach several tiles and ragged edges with small shapes

    def shared_memory(self, tile: Tile, result_bytes: int) -> int:
        """An upper bound of the bytes of shared memory that the compiled kernel uses."""
        step = tile.rows * self.step_bytes[0] + tile.columns * self.step_bytes[1]
        converted = tile.rows * self.converted_bytes[0] + tile.columns * self.converted_bytes[1]
        steps = int(tile.depth * (tile.stages * step + converted))
        # A result passes through shared memory to be written in whole lines; flattened, while the next steps load.
        result = tile.rows * tile.columns * result_bytes
        return (steps + result if tile.flatten else max(steps, result)) + KIB  # the rest: barriers and descriptors

    def fits(self, tile: Tile, capability: int, result_bytes: int) -> bool:
        """Whether a GPU of ``capability`` (10 * major + minor) can run ``tile`` with results of that size."""
        generation = capability // 10
        if tile.generations and generation not in tile.generations:
            return False
        # tcgen05 leaves its sums in tensor memory, from where a thread reads all of its share at once.
        if generation in (10, 11) and tile.rows * tile.columns * result_bytes > tile.warps * LARGEST_SHARE:
            return False
        return self.shared_memory(tile, result_bytes) <= shared_memory_limit(capability)

    def candidates(self, capability: int, tokens: int, result_bytes: int) -> list[Tile]:
        """The tiles worth timing on a GPU for a number of tokens; never empty."""
        fitting = [tile for tile in self.tiles if self.fits(tile, capability, result_bytes)]
        if not self.rows_are_tokens:
            return fitting
        # Tiles mostly beyond the last token, or so low that the weights are read many times, are never the fastest.
        return [tile for tile in fitting if min(64, tokens // 8) <= tile.rows <= max(64, 4 * tokens)] or fitting


def shared_memory_limit(capability: int) -> int:
    """Bytes of shared memory a block may use; of an unknown GPU, the least of its generation."""
    if capability in SHARED_MEMORY:
        return SHARED_MEMORY[capability]
    generation = [limit for known, limit in SHARED_MEMORY.items() if known // 10 == capability // 10]
    return min(generation or SHARED_MEMORY.values())


def capability_of(tensor: Tensor) -> int:
    """10 * major + minor of the tensor's GPU, 0 for a CPU (Triton's interpreter)."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def multiprocessors(tensor: Tensor) -> int:
    """How many blocks the tensor's GPU works on at once, at one each; 2 for the interpreter, so that blocks loop."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def token_bucket(tokens: int) -> int:
    """``tokens`` rounded up to a power of two: what tuning depends on, so that varying counts do not tune again."""
    return max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length())


def uses_tma(*matrices: Tensor) -> bool:
    """Whether tiles of all ``matrices`` (rows contiguous) can be copied by the tensor memory accelerator."""
    return capability_of(matrices[0]) >= TMA_SINCE and all(
        m.stride(1) == 1
        and m.stride(0) >= m.shape[1]
        and m.stride(0) * m.itemsize % TMA_ALIGNMENT == 0
        and m.data_ptr() % TMA_ALIGNMENT == 0
        for m in matrices
    )


def rows_contiguous(matrix: Tensor) -> Tensor:
    """``matrix`` if the elements of a row are adjacent, otherwise a copy of it where they are."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def persistent_grid(tensor: Tensor, rows: int, columns: int) -> Callable[[dict[str, Any]], tuple[int]]:
    """The grid of a kernel whose blocks walk the tiles of a (rows, columns) result: as many as run at once."""
    processors = multiprocessors(tensor)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        block_rows, block_columns = meta["BLOCK_ROWS"], meta["BLOCK_COLUMNS"]
        # One block of 128 x 256 fills a multiprocessor; of smaller tiles several share one and hide each other's waits.
        at_once = processors * max(1, min(4, 2 * 128 * 128 // (block_rows * block_columns)))
        return (min(at_once, triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)),)

    return grid


def launch(kernel: Any, family: Family, grid: Any, arguments: dict[str, Any]) -> None:
    """Runs ``kernel`` with the fastest tile of ``family`` for these arguments (found on first use, kept on disk).

    The kernel's arguments must include ``out``, ``tokens_bucket``, ``N``, ``K`` and ``TMA``. Timing runs the kernel, so
    the first call for a shape must not be inside the capture of a CUDA graph.
    """
    out = arguments["out"]
    if not out.is_cuda:
        kernel[grid](**arguments, **family.interpreted.constants())
        return
    with torch.cuda.device_of(out):
        if arguments["TMA"]:
            # Descriptors are made in the kernel, in memory that Triton asks for. The setting belongs to the thread, and
            # autograd has its own, hence for every launch.
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=out.device))
        autotuned(kernel, family)[grid](**arguments, enable_fp_fusion=False)


@functools.cache
def autotuned(kernel: Any, family: Family) -> Any:
    """The autotuner of a kernel; one for the process, since it keeps what it found."""
    configs = {tile: triton.Config(tile.constants(), tile.warps, tile.stages) for tile in family.tiles}

    def prune(_: list[triton.Config], named: dict[str, Any], **by_keyword: Any) -> list[triton.Config]:
        arguments = {**named, **by_keyword}
        out = arguments["out"]
        tiles = family.candidates(capability_of(out), arguments["tokens_bucket"], out.itemsize)
        return [configs[tile] for tile in tiles]

    return triton.autotune(
        configs=list(configs.values()),
        key=["tokens_bucket", "N", "K", "TMA"],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )(kernel)


@dataclass(frozen=True, kw_only=True)
class TiledSpecialisation(Specialisation):
    """The compiled form of a kernel with one tile of a family."""

    family: Family
    tile: Tile

    def pruned(self, capability: int) -> bool:
        """Whether the autotuner would not even time it on a GPU of ``capability``."""
        return not self.family.fits(self.tile, capability, RESULT_BYTES[self.signature["out"].removesuffix(":16")])


RESULT_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}


def specialisations(
    kernel: Any,
    family: Family,
    signature: dict[str, str],
    constants: dict[str, object],
    instruction: str | None,
    minimum: int = 80,
) -> list[Specialisation]:
    """Every tile of a family for these argument types, through pointers and through the TMA."""
    return [
        TiledSpecialisation(
            kernel=kernel,
            signature={"M": "i32", "N": "i32:16", "K": "i32:16", "tokens_bucket": "i32", **signature},
            constants={**constants, **tile.constants(), "TMA": tma},
            num_warps=tile.warps,
            num_stages=tile.stages,
            instruction=instruction,
            minimum=max(minimum, TMA_SINCE if tma else 0),
            family=family,
            tile=tile,
        )
        for tma in (False, True)
        for tile in family.tiles
    ]


# On Hopper, Triton (3.6 to 3.9) waits for every step of an integer product before it issues the next (its WGMMAPipeline
# pass leaves only float32 sums in flight). Deep steps wait less often, and two blocks on a multiprocessor fill each
# other's waits: 128 x 128 with three stages leaves room for two.
INT8 = Family(
    (
        Tile(128, 256, 128, 8, 3, generations=HOPPER_AND_BLACKWELL),
        Tile(128, 256, 128, 8, 3, generations=HOPPER_AND_BLACKWELL, flatten=True),
        Tile(128, 256, 256, 8, 2, generations=HOPPER),
        Tile(128, 128, 256, 8, 3, generations=HOPPER),
        Tile(128, 128, 128, 8, 4, generations=HOPPER_AND_BLACKWELL, flatten=True),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 128, 4, 3),
        Tile(64, 64, 128, 4, 4),
        Tile(16, 128, 128, 4, 4),
        Tile(16, 64, 256, 4, 4),
    ),
    step_bytes=(1, 1),
)
# Hopper adds every step's sums to a second set of registers, hence no tiles beyond 128 x 128.
FP8 = Family(
    (
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 128, 8, 4, generations=HOPPER_AND_BLACKWELL, flatten=True),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 128, 4, 3),
        Tile(64, 64, 128, 4, 4),
    ),
    step_bytes=(1, 1),
)
# A step holds four tiles of activations for one of bytes with four weights each.
PACKED = Family(
    (
        Tile(128, 128, 64, 8, 3, generations=HOPPER_AND_BLACKWELL),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 128, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(16, 128, 64, 8, 4),
        Tile(16, 64, 64, 4, 4),
    ),
    step_bytes=(4, 1),
    converted_bytes=(0, 4),
)
FLOAT = Family(
    (
        Tile(128, 256, 64, 8, 3, generations=HOPPER),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 64, 32, 8, 4),
        Tile(64, 128, 32, 8, 4),
        Tile(64, 64, 32, 8, 3),
    ),
    step_bytes=(2, 1),
    converted_bytes=(2, 2),
)
WEIGHT = Family(
    (
        Tile(128, 256, 64, 8, 3, generations=HOPPER),
        Tile(256, 128, 64, 8, 3, generations=HOPPER),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 32, 8, 4),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    ),
    step_bytes=(2, 1),
    converted_bytes=(0, 2),
    rows_are_tokens=False,
)
# The depth is the block that shares a scale; the sums of a block and the total are two sets of registers.
BLOCK_WEIGHT = Family(
    (
        Tile(128, 128, 128, 8, 4, generations=HOPPER_AND_BLACKWELL),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 64, 128, 4, 3),
        Tile(64, 64, 128, 4, 3),
    ),
    step_bytes=(1, 1),
    rows_are_tokens=False,
    interpreted=Tile(16, 16, 128, 4, 1),
)
# Full float32 products run outside the tensor cores; they serve tests and debugging, where one tile is enough.
FLOAT32 = Family((Tile(32, 32, 32, 4, 2),), step_bytes=(4, 4), converted_bytes=(4, 4), rows_are_tokens=False)
