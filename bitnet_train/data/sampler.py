"""Which window of the corpus is the n-th training sample: a pure function of the seed and n.

Nothing has to be stored or replayed to resume: the state of the sampler is the number of samples consumed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat

import numpy as np
from torch.utils.data import Sampler

# The run is one endless epoch that the trainer's step limit ends, whatever the size of the corpus.
ENDLESS = 10**12


def _mix(value: np.uint64, key: int) -> np.uint64:
    """A 64-bit integer hash (the finaliser of SplitMix64, Steele et al. 2014) of ``value`` under ``key``."""
    with np.errstate(over="ignore"):
        z = value + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shuffled(index: int, size: int, seed: int, epoch: int) -> int:
    """Where a random permutation of ``size`` elements, chosen by (seed, epoch), sends ``index``.

    A four-round Feistel network over the smallest even number of bits that holds ``size``, walked until the result is
    in range (Black and Rogaway, 2002): a bijection in constant memory, so that 10^9 samples need no stored permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    value = np.uint64(index)
    while True:
        left, right = value >> np.uint64(half), value & low
        for round_number in range(4):
            key = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + round_number * 0x8CB92BA72F3D8DD7) % 2**64
            left, right = right, left ^ (_mix(right, key) & low)
        value = (left << np.uint64(half)) | right
        if value < size:
            return int(value)


def sample_index(n: int, size: int, seed: int) -> int:
    """The window that is the n-th training sample: every epoch visits all ``size`` windows once, in its own order."""
    epoch, position = divmod(n, size)
    return shuffled(position, size, seed, epoch)


def sample_indices(numbers: np.ndarray, size: int, seed: int) -> np.ndarray:
    """:func:`sample_index` of many sample numbers int (n,) at once, int64 (n,): the same numbers, much faster."""
    epochs, positions = np.divmod(numbers.astype(np.uint64), np.uint64(size))
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    values, waiting = positions, np.ones(len(numbers), dtype=bool)
    while waiting.any():
        left, right = values[waiting] >> half, values[waiting] & low
        for round_number in range(4):
            key = np.uint64((seed * 0x9E3779B97F4A7C15 + round_number * 0x8CB92BA72F3D8DD7) % 2**64)
            with np.errstate(over="ignore"):
                keys = epochs[waiting] * np.uint64(0xD1B54A32D192ED03) + key
            left, right = right, left ^ (_mix_all(right, keys) & low)
        values[waiting] = (left << half) | right
        waiting = values >= size
    return values.astype(np.int64)


def random_words(numbers: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """A random word uint64 (n,) for each sample number, a pure function of number, seed and purpose."""
    keys = np.full(len(numbers), (seed * 0x9E3779B97F4A7C15 + purpose * 0x8CB92BA72F3D8DD7) % 2**64, dtype=np.uint64)
    # Twice, because neighbouring numbers under neighbouring keys are close to each other.
    return _mix_all(_mix_all(numbers.astype(np.uint64), keys), keys)


def _mix_all(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """:func:`_mix` of arrays."""
    with np.errstate(over="ignore"):
        z: np.ndarray = values + keys
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class ConsumedBatchSampler(Sampler[list[int]]):
    """Batches of ``batch`` sample numbers, starting after ``consumed`` samples; endless.

    Before them come those of ``early``, pairs (number of batches, samples in each). With ``world`` processes, process
    ``rank`` takes every world-th batch, so that together they consume the samples in the same order as one process
    would. ``order`` (sample number -> window) takes the place of :func:`sample_index`.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        consumed: int = 0,
        rank: int = 0,
        world: int = 1,
        early: Sequence[tuple[int, int]] = (),
        order: Callable[[int], int] | None = None,
    ) -> None:
        self.size, self.batch, self.seed, self.consumed = size, batch, seed, consumed
        self.rank, self.world, self.early = rank, world, early
        self.order = order or partial(sample_index, size=size, seed=seed)

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed
        sizes = chain(*(repeat(size, count) for count, size in self.early), repeat(self.batch))
        for number, size in enumerate(sizes):
            if number % self.world == self.rank:
                yield [self.order(n) for n in range(first, first + size)]
            first += size
