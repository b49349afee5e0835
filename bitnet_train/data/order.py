"""Which window is the n-th sample: a pure function of the seed and n, and in a mixture of the stages' shares.

:func:`corpus_order` is that of one corpus; the rest is about mixtures. Samples come in blocks of 1,000, in which every
corpus has its rounded share, in an order of the block's own. The k-th sample of a corpus is the k-th of its own endless
epochs (:func:`corpus_order`), whatever the shares are and were, so that no window comes back before all others of its
corpus have been seen.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from bitnet_train.data.config import Shuffle
from bitnet_train.data.mixture import BLOCK
from bitnet_train.data.sampler import random_words, sample_index, shuffled


def blockwise_index(n: int, size: int, seed: int, block: int) -> int:
    """The window that is the n-th sample when blocks of ``block`` neighbours are shuffled, and each inside.

    Every epoch visits all ``size`` windows once. The blocks are cut anew in each: they begin at an offset of the
    epoch's own, so that windows at a border are not forever apart (the windows before it are a shorter first block, and
    the last one is shorter too). Constant memory, whatever ``n`` and ``size``.
    """
    epoch, position = divmod(n, size)
    if block >= size:
        return shuffled(position, size, seed, epoch)
    own, first, whole, short = _blocks(size, seed, block, epoch)
    skipped = 0
    for place, start, length in short:
        begin = place + skipped
        if position < begin:
            break
        if position < begin + length:
            return start + shuffled(position - begin, length, _word(own, start), epoch)
        skipped += length
    number, offset = divmod(position - skipped, block)
    chosen = shuffled(number, whole, own, epoch)
    return first + chosen * block + shuffled(offset, block, _word(own, first + chosen * block), epoch)


@lru_cache(maxsize=64)
def _blocks(size: int, seed: int, block: int, epoch: int) -> tuple[int, int, int, list[tuple[int, int, int]]]:
    """Of an epoch: its seed, the windows before the first whole block, the number of whole blocks, and both short ones:
    (whole windows before it in the order, its first window, its length), in the order's order.
    """
    own = _word(seed, epoch)
    first = own % block
    whole, last = divmod(size - first, block)
    # Short blocks are put at places of their own among the whole ones, so that a position tells its block at once.
    places = [(_word(own, 1) % (whole + 1) * block, 0, first), (_word(own, 2) % (whole + 1) * block, size - last, last)]
    return own, first, whole, sorted(places)


def _word(seed: int, number: int) -> int:
    """A random 64-bit word of (seed, number), a pure function."""
    return int(random_words(np.array([number]), seed, 1)[0])


def in_order(n: int, size: int) -> int:
    """The window that is the n-th sample without shuffling."""
    return n % size


def corpus_order(size: int, seed: int, shuffle: Shuffle = Shuffle.full, block: int = 1) -> Callable[[int], int]:
    """Sample number -> one of ``size`` windows, in endless epochs; ``block`` windows are a block of ``window``."""
    if shuffle is Shuffle.none:
        return partial(in_order, size=size)
    if shuffle is Shuffle.window:
        return partial(blockwise_index, size=size, seed=seed, block=block)
    return partial(sample_index, size=size, seed=seed)


@dataclass(frozen=True)
class Segment:
    """From sample ``start`` on, a block holds ``counts`` samples of each corpus."""

    start: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """After ``samples`` samples, ``counts`` were of each corpus: where another mixture goes on (a fork)."""

    samples: int
    counts: tuple[int, ...]


class MixtureOrder:
    """Called with a sample number, gives the window: an index into the corpora's windows, one corpus after the other.

    Args:
        sizes: windows of each corpus, by name.
        segments: by ascending start; the first starts at 0.
        seed: of the run.
        origin: what had been drawn when these segments came into force; samples before it belong to another mixture.
        shuffle, block: the order within each corpus, as in :func:`corpus_order`.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        segments: list[Segment],
        seed: int,
        origin: Drawn | None = None,
        shuffle: Shuffle = Shuffle.full,
        block: int = 1,
    ) -> None:
        self.sizes, self.seed, self.segments = list(sizes.values()), seed, segments
        self.origin = origin or Drawn(0, (0,) * len(sizes))
        self._offsets = np.cumsum([0, *self.sizes]).tolist()
        # A corpus's order is its own, also beside one of the same size.
        seeds = [(seed << 32) + zlib.crc32(name.encode()) for name in sizes]
        self._orders = [corpus_order(*pair, shuffle, block) for pair in zip(self.sizes, seeds, strict=True)]
        self._block: tuple[object, np.ndarray, np.ndarray] = (None, np.empty(0), np.empty(0))
        live = [s for s, after in zip(segments, [*segments[1:], None], strict=True) if after is None or
                after.start > self.origin.samples]  # fmt: skip
        self._live = [Segment(max(s.start, self.origin.samples), s.counts) for s in live]
        self._drawn = [np.array(self.origin.counts, dtype=np.int64)]
        for segment, after in zip(self._live, self._live[1:], strict=False):
            self._drawn.append(self._drawn[-1] + self._within(segment, after.start - segment.start))

    def __call__(self, n: int) -> int:
        number = self._segment(n)
        segment = self._live[number]
        block, place = divmod(n - segment.start, BLOCK)
        corpora, ranks = self._block_order(segment, block)
        corpus = int(corpora[place])
        nth = int(self._drawn[number][corpus]) + block * segment.counts[corpus] + int(ranks[place])
        return self._offsets[corpus] + self._orders[corpus](nth)

    def drawn(self, n: int) -> Drawn:
        """How many of the first ``n`` samples were of each corpus."""
        number = self._segment(n)
        counts = self._drawn[number] + self._within(self._live[number], n - self._live[number].start)
        return Drawn(n, tuple(counts.tolist()))

    def _segment(self, n: int) -> int:
        if n < self.origin.samples:
            raise ValueError(f"sample {n} lies before the origin of this mixture, {self.origin.samples}")
        return max(i for i, segment in enumerate(self._live) if segment.start <= n)

    def _within(self, segment: Segment, samples: int) -> np.ndarray:
        """Samples of each corpus among the first ``samples`` of a segment."""
        blocks, rest = divmod(samples, BLOCK)
        counts = blocks * np.array(segment.counts, dtype=np.int64)
        if rest:
            corpora, _ = self._block_order(segment, blocks)
            counts += np.bincount(corpora[:rest], minlength=len(self.sizes))
        return counts

    def _block_order(self, segment: Segment, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(the corpus of each place, how many of that corpus come before it), int64 (BLOCK,) each; the last is kept."""
        key = (segment, block)
        if self._block[0] != key:
            first = segment.start + block * BLOCK
            slots = [shuffled(place, BLOCK, self.seed << 32, first) for place in range(BLOCK)]
            corpora = np.repeat(np.arange(len(segment.counts)), segment.counts)[slots]
            ranks = np.empty(BLOCK, dtype=np.int64)
            for corpus, count in enumerate(segment.counts):
                ranks[corpora == corpus] = np.arange(count)
            self._block = (key, corpora, ranks)
        return self._block[1], self._block[2]
