"""Which window of which corpus is the n-th sample of a mixture: a pure function of the seed, n and the stages' shares.

Samples come in blocks of 1,000, in which every corpus has its rounded share, in an order of the block's own. The k-th
sample of a corpus is the k-th of its own endless epochs (``data.sampler.sample_index``), whatever the shares are and
were, so that no window comes back before all others of its corpus have been seen.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from bitnet_train.data.mixture import BLOCK
from bitnet_train.data.sampler import sample_index, shuffled


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
    """

    def __init__(self, sizes: dict[str, int], segments: list[Segment], seed: int, origin: Drawn | None = None) -> None:
        self.sizes, self.seed, self.segments = list(sizes.values()), seed, segments
        self.origin = origin or Drawn(0, (0,) * len(sizes))
        self._offsets = np.cumsum([0, *self.sizes]).tolist()
        # A corpus's order is its own, also beside one of the same size.
        self._seeds = [(seed << 32) + zlib.crc32(name.encode()) for name in sizes]
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
        return self._offsets[corpus] + sample_index(nth, self.sizes[corpus], self._seeds[corpus])

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
