"""The order of training samples: a permutation per epoch, a pure function of seed and position."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.data.sampler import ConsumedBatchSampler, sample_index, shuffled


def epoch_order(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return [shuffled(i, size, seed, epoch) for i in range(size)]


def take(count: int, size: int = 50, batch: int = 4, seed: int = 3, **fields: int) -> list[list[int]]:
    return list(itertools.islice(ConsumedBatchSampler(size, batch, seed, **fields), count))


@given(st.integers(1, 300), st.integers(-(2**40), 2**63), st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [10**6, 10**9, 2**33 + 1])
def test_large_sizes_stay_in_range_without_repeats(size: int) -> None:
    places = [0, 1, 2, size // 2, size - 2, size - 1, *range(1000, 1500)]
    values = [shuffled(i, size, 1, 0) for i in places]
    assert len(set(values)) == len(values)
    assert all(0 <= value < size for value in values)


def test_the_order_is_a_fixed_function_of_seed_and_position() -> None:
    # A run that is continued after an upgrade must see the same order.
    assert epoch_order(10, seed=0, epoch=0) == [0, 2, 6, 3, 7, 4, 8, 9, 1, 5]
    before = epoch_order(64, 7, 2)
    np.random.seed(1)
    torch.manual_seed(99)
    assert epoch_order(64, 7, 2) == before


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [tuple(epoch_order(40, seed, epoch)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400


def test_every_epoch_visits_all_windows_once_in_its_own_order() -> None:
    samples = [sample_index(n, 30, seed=5) for n in range(90)]
    epochs = [samples[0:30], samples[30:60], samples[60:90]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def place_counts(size: int, trials: int) -> np.ndarray:
    """How often place i held window j over ``trials`` seeds, relative to chance."""
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), epoch_order(size, seed, seed % 7)] += 1
    return counts * size / trials


def test_shuffling_is_uniform() -> None:
    size, trials = 24, 800
    chi2 = ((place_counts(size, trials) - 1) ** 2).sum() * trials / size / (size - 1) ** 2
    assert 0.8 < chi2 < 1.4  # per degree of freedom, 1 by chance


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_even_a_handful_of_windows_is_shuffled(size: int) -> None:
    # A Feistel network over so few bits is uneven (a place of 5 keeps its window in 26 % of the seeds), never stuck.
    assert np.abs(place_counts(size, 800) - 1).max() < 0.5


def test_neighbours_are_torn_apart() -> None:
    order = np.array(epoch_order(4096, seed=11))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06
    assert (np.diff(order) == 1).sum() < 12


def test_small_permutations_are_all_reached() -> None:
    assert len({tuple(epoch_order(4, seed)) for seed in range(600)}) == 24


def test_batches_run_through_the_samples_in_order() -> None:
    flat = [i for batch in take(30) for i in batch]
    assert flat == [sample_index(n, 50, 3) for n in range(120)]


@pytest.mark.parametrize("consumed_batches", [1, 12, 13, 40])
def test_resuming_after_k_samples_equals_continuing(consumed_batches: int) -> None:
    assert take(5, consumed=4 * consumed_batches) == take(5 + consumed_batches)[consumed_batches:]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_consume_the_order_of_one_process(world: int) -> None:
    ranks = [take(6, rank=rank, world=world) for rank in range(world)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == take(6 * world)
    resumed = [take(4, rank=rank, world=world, consumed=2 * 4 * world) for rank in range(world)]
    assert [r[2:] for r in ranks] == resumed


def test_an_epochs_border_may_lie_inside_a_batch() -> None:
    flat = [i for batch in take(5, size=7, batch=3) for i in batch]
    assert sorted(flat[:7]) == sorted(flat[7:14]) == list(range(7))


def test_one_window_is_sampled_again_and_again() -> None:
    assert take(3, size=1, batch=2) == [[0, 0]] * 3
