"""Tile sizes of the matmul kernels as plain data, what of them fits a GPU, and how a kernel is launched with them.

The same lists and the same pruning serve the autotuner at run time and the ahead-of-time check without a GPU.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

KIB = 1024

# Shared memory that one block may use (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_MEMORY = {
    80: 163 * KIB, 86: 99 * KIB, 87: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB,
    100: 227 * KIB, 103: 227 * KIB, 110: 227 * KIB, 120: 99 * KIB, 121: 99 * KIB,
}  # fmt: skip
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TMA_SINCE = 90  # the tensor memory accelerator: whole tiles copied by one instruction
TMA_ALIGNMENT = 16  # bytes, of the first element and of the row stride

# Every number of tokens up to twice another would otherwise be tuned (seconds) on its own.
SMALLEST_BUCKET = 16


@dataclass(frozen=True)
class Tile:
    """One way to cut a matmul: a block of the result and the depth of one step along the contraction."""

    rows: int  # of the first operand
    columns: int  # of the second operand
    depth: int  # elements of the contraction a step
    warps: int
    stages: int  # steps in flight

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {"BLOCK_ROWS": self.rows, "BLOCK_COLUMNS": self.columns, "BLOCK_DEPTH": self.depth}


@dataclass(frozen=True)
class Family:
    """What a kernel is tuned over.

    ``step_bytes`` is what one element along the contraction of a row and of a column of the tile takes in shared memory
    (per stage), ``staging_bytes`` what they take once, for operands that are converted on the way to the tensor cores.
    """

    tiles: tuple[Tile, ...]
    step_bytes: tuple[float, float]
    staging_bytes: tuple[float, float] = (0.0, 0.0)
    key: tuple[str, ...] = ("tokens_bucket", "N", "K")

    def shared_memory(self, tile: Tile) -> int:
        """An upper bound of the bytes of shared memory that the compiled kernel uses."""
        steps = tile.rows * self.step_bytes[0] + tile.columns * self.step_bytes[1]
        staging = tile.rows * self.staging_bytes[0] + tile.columns * self.staging_bytes[1]
        # The result is laid out again on its way to memory, a part at a time; barriers and descriptors take the rest.
        return int(tile.depth * (tile.stages * steps + staging)) + KIB

    def fits(self, tile: Tile, capability: int) -> bool:
        """Whether a GPU of ``capability`` (10 * major + minor) has the shared memory for ``tile``."""
        return self.shared_memory(tile) <= shared_memory_limit(capability)


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


def token_bucket(tokens: int) -> int:
    """``tokens`` rounded up to a power of two: what tuning depends on, so that varying counts do not tune again."""
    return max(SMALLEST_BUCKET, triton.next_power_of_2(tokens))
