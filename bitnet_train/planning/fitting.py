"""The largest micro-batch that fits: memory as a line over the number of sequences, and the search along the divisors.

No torch here: ``command=estimate`` reckons with the same arithmetic on estimated figures.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# Share of the available memory that may be used. The rest is for what a pass does not show: validation, the
# allocator's holes, and on a CPU loader processes, a checkpoint being read and other people's programs.
SHARE = {"cuda": 0.92, "cpu": 0.8}


def divisors(number: int) -> list[int]:
    """All divisors, ascending: the micro-batches that cut a step of ``number`` sequences into equal parts."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


@dataclass(frozen=True)
class MemoryLine:
    """Bytes of a pass: ``fixed`` whatever its size, and ``per_sequence``."""

    fixed: float
    per_sequence: float

    @classmethod
    def through(cls, bytes_by_size: Mapping[int, int]) -> "MemoryLine":
        """The line through the smallest and the largest size measured; a single size is taken for a line from zero.

        Neither part is below zero, which only noise could make it.
        """
        low, high = min(bytes_by_size), max(bytes_by_size)
        if low == high:
            return cls(0.0, bytes_by_size[low] / low)
        slope = max(0.0, (bytes_by_size[high] - bytes_by_size[low]) / (high - low))
        slope = min(slope, bytes_by_size[high] / high)
        return cls(bytes_by_size[high] - slope * high, slope)

    def at(self, size: int) -> float:
        """Bytes of a pass over ``size`` sequences."""
        return self.fixed + self.per_sequence * size

    def largest(self, sizes: Iterable[int], budget: float) -> int | None:
        """The largest of ``sizes`` that needs no more than ``budget`` bytes."""
        return max((size for size in sizes if self.at(size) <= budget), default=None)


def climb(
    sizes: list[int], line: MemoryLine, budget: float, measure: Callable[[int], int | None]
) -> dict[int, int | None]:
    """Try the size that ``line`` calls the largest within ``budget``, and go on from there by what is measured.

    ``measure`` runs a size and returns its bytes, or None when it ran out of memory. Below a failure the next smaller
    of ``sizes`` (ascending) is tried; after a success a larger one, if the line through what was measured says that it
    fits too. The result holds every size that was tried: its bytes, or None where they do not fit.
    """
    tried: dict[int, int | None] = {}
    size = line.largest(sizes, budget) or sizes[0]
    while size not in tried:
        used = measure(size)
        tried[size] = used if used is not None and used <= budget else None
        failed = min((s for s, outcome in tried.items() if outcome is None), default=sizes[-1] + 1)
        below = [s for s in sizes if s < failed]
        if not below:
            break
        if used is None or tried[size] is None:
            size = below[-1]
        else:
            # Half the slope at the least: a measurement that was too low must not lead to a size that gets us killed.
            slope = max((used - line.fixed) / size, line.per_sequence / 2)
            size = max(size, MemoryLine(line.fixed, slope).largest(below, budget) or size)
    return tried
