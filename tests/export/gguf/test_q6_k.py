"""Our Q6_K, which gguf-py reads and does not write: 6-bit codes with a scale for each 16 weights."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet_train.export.gguf.blocks import BLOCK, Q6_K_BYTES
from bitnet_train.export.gguf.layouts import pack_q6_k


def read(packed: Tensor) -> Tensor:
    """What gguf-py makes of it."""
    return torch.from_numpy(quants.dequantize(packed.numpy(), GGMLQuantizationType.Q6_K))


def relative_error(values: Tensor) -> float:
    return float((read(pack_q6_k(values)) - values).norm() / values.norm())


@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    spread=st.sampled_from([1e-2, 1.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_gguf_py_reads_values_near_ours(rows: int, blocks: int, spread: float, seed: int) -> None:
    values = torch.randn(rows, blocks * BLOCK, generator=torch.Generator().manual_seed(seed)) * spread
    packed = pack_q6_k(values)
    assert packed.shape == (rows, blocks * Q6_K_BYTES)
    # Half a step of 1/32 of the largest of 16 weights, and as much again for the 8-bit scale of the 16.
    groups = values.reshape(-1, 16)
    error = (read(packed) - values).reshape(-1, 16).abs()
    largest_of_block = values.reshape(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK // 16)
    assert bool((error.amax(1) <= groups.abs().amax(1) / 32 + largest_of_block / 128).all())


def test_the_error_is_that_of_six_bits() -> None:
    assert relative_error(torch.randn(64, 1024)) < 0.02


def test_values_on_the_grid_are_exact() -> None:
    codes = torch.randint(-32, 32, (4, BLOCK)).float()
    codes.reshape(-1, 16)[:, 0] = -32
    values = codes * 2**-7
    assert torch.equal(read(pack_q6_k(values)), values)


@pytest.mark.parametrize("zeros", [slice(None), slice(0, 16), slice(16, BLOCK)])
def test_zeros_stay_zeros(zeros: slice) -> None:
    values = torch.randn(2, BLOCK)
    values[:, zeros] = 0
    found = read(pack_q6_k(values))
    assert bool((found[:, zeros] == 0).all())
    assert bool(torch.isfinite(found).all())


def test_outliers_of_either_sign_keep_their_size() -> None:
    values = torch.randn(2, BLOCK) * 0.01
    values[0, 5], values[1, 200] = 3.0, -3.0
    found = read(pack_q6_k(values))
    assert float(found[0, 5]) == pytest.approx(3.0, rel=0.02)
    assert float(found[1, 200]) == pytest.approx(-3.0, rel=0.02)


def test_rows_do_not_see_each_other() -> None:
    values = torch.randn(3, 2 * BLOCK)
    whole = pack_q6_k(values)
    assert all(np.array_equal(whole[i : i + 1], pack_q6_k(values[i : i + 1])) for i in range(3))
