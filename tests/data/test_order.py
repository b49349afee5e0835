"""The order of windows within a corpus: shuffled as a whole, in blocks, or not at all."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.data.config import Shuffle
from bitnet_train.data.order import MixtureOrder, Segment, blockwise_index, corpus_order
from bitnet_train.data.sampler import ConsumedBatchSampler, sample_index
from bitnet_train.errors import ConfigError
from tests.composing import compose_config


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 2**63), st.integers(0, 10**6))
def test_every_epoch_visits_every_window_once(size: int, block: int, seed: int, epoch: int) -> None:
    order = [blockwise_index(epoch * size + i, size, seed, block) for i in range(size)]
    assert sorted(order) == list(range(size))


def test_a_block_is_finished_before_the_next_begins() -> None:
    size, block = 1003, 50
    for epoch in range(5):
        order = np.array([blockwise_index(epoch * size + i, size, 3, block) for i in range(size)])
        # Within any 50 samples only windows of the block that ends and the one that begins; the short blocks at both
        # ends of the corpus may be visited in between.
        for start in range(0, size - block, 7):
            reached = np.sort(order[start : start + block])
            assert 1 + (np.diff(reached) > block).sum() <= 4
        # Neighbours of the text are not neighbours of the order, and blocks are out of order.
        assert (np.abs(np.diff(order)) == 1).mean() < 0.1
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.75


def test_epochs_and_seeds_have_orders_and_borders_of_their_own() -> None:
    size, block = 120, 10
    orders = {
        tuple(blockwise_index(e * size + i, size, s, block) for i in range(size)) for e in range(6) for s in (1, 2)
    }
    assert len(orders) == 12
    together = 0
    for epoch in range(40):  # 9 and 10 are of one block in some epochs and not in others
        places = {blockwise_index(epoch * size + i, size, 5, block): i for i in range(size)}
        together += abs(places[9] - places[10]) < block
    assert 20 < together < 40


def test_it_is_a_fixed_function() -> None:
    # A run that is continued after an upgrade must see the same order.
    assert [blockwise_index(n, 12, 7, 4) for n in range(24)] == FIXED
    whole = corpus_order(50, 3)
    assert [whole(n) for n in range(120)] == [sample_index(n, 50, 3) for n in range(120)]
    blocks_of_everything = corpus_order(50, 3, Shuffle.window, 50)
    assert [blocks_of_everything(n) for n in range(120)] == [sample_index(n, 50, 3) for n in range(120)]
    assert [corpus_order(5, 3, Shuffle.none)(n) for n in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


FIXED = [2, 3, 1, 0, 7, 6, 4, 5, 11, 10, 8, 9, 7, 6, 5, 4, 8, 10, 11, 9, 0, 1, 3, 2]


def test_billions_of_windows_take_no_memory() -> None:
    order = corpus_order(4 * 10**9, 1, Shuffle.window, 65536)
    order(0)
    tracemalloc.start()
    found = [order(n) for n in (0, 1, 2, 65535, 65536, 10**9, 4 * 10**9 - 1, 4 * 10**9, 10**15)]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert all(0 <= window < 4 * 10**9 for window in found)
    assert len(set(found)) == len(found)
    assert abs(found[0] - found[1]) < 65536


@pytest.mark.parametrize("shuffle", list(Shuffle))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_another_number_of_processes_resumes_on_the_right_sample(shuffle: Shuffle, world: int) -> None:
    order = corpus_order(41, 3, shuffle, 8)

    def batches(count: int, consumed: int, rank: int, of: int) -> list[list[int]]:
        sampler = iter(ConsumedBatchSampler(41, 2, 3, consumed, rank, of, order=order))
        return [next(sampler) for _ in range(count)]

    flat = [window for batch in batches(60, 0, 0, 1) for window in batch]
    consumed = 24  # of whatever number of processes
    ranks = [batches(4, consumed, rank, world) for rank in range(world)]
    seen = [window for step in zip(*ranks, strict=True) for batch in step for window in batch]
    assert seen == flat[consumed : consumed + len(seen)]


def test_a_mixture_shuffles_each_corpus_so() -> None:
    sizes, segments = {"a": 90, "b": 40}, [Segment(0, (500, 500))]
    order = MixtureOrder(sizes, segments, 3, shuffle=Shuffle.none)
    of_a = [w for w in (order(n) for n in range(400)) if w < 90]
    assert of_a == [i % 90 for i in range(len(of_a))]
    blocks = MixtureOrder(sizes, segments, 3, shuffle=Shuffle.window, block=10)
    of_a = [w for w in (blocks(n) for n in range(400)) if w < 90]
    assert sorted(of_a[:90]) == list(range(90))
    assert of_a[:90] != sorted(of_a[:90])
    plain, full = (MixtureOrder(sizes, segments, 3, **more) for more in ({}, {"shuffle": Shuffle.full}))  # type: ignore[arg-type]
    assert [plain(n) for n in range(300)] == [full(n) for n in range(300)]


@pytest.mark.parametrize("wrong", ["0", "-3", "2000000000000"])
def test_a_block_has_at_least_one_window(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle_window is"):
        compose_config("+recipe=tiny", "data.shuffle=window", f"data.shuffle_window={wrong}")
