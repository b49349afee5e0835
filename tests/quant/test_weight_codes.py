"""The ternary and binary weight quantisers against their formulas."""

import numpy as np
import pytest
import torch

from bitnet_train.errors import ConfigError
from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import SCALE_FLOOR, absmean_scale, binarise, quantise_weight, ternarise

GROUPS = [1, 2, 3, 6, 12]


def textbook_scale(weight: torch.Tensor, groups: int) -> np.ndarray:
    """mean|W| per group of rows in float64 NumPy, rounded once to float32."""
    blocks = np.abs(weight.float().numpy().astype(np.float64)).reshape(groups, -1)
    return np.maximum(blocks.mean(axis=1).astype(np.float32), np.float32(SCALE_FLOOR))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ternary_codes_are_the_rounded_and_clipped_ratio(groups: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(12, 37) * torch.linspace(0.01, 3, 12)[:, None]).to(dtype)
    codes = ternarise(weight, groups=groups)
    scale = textbook_scale(weight, groups)
    row_scale = torch.from_numpy(scale).repeat_interleave(12 // groups)[:, None]
    assert codes.codes.dtype is torch.int8
    assert codes.scale.dtype is torch.float32
    assert torch.equal(codes.scale, torch.from_numpy(scale))
    assert torch.equal(codes.codes, torch.round(weight.float() / row_scale).clamp(-1, 1).to(torch.int8))
    assert set(codes.codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(codes.row_scale(), row_scale[:, 0])
    assert torch.equal(codes.dequantise(), codes.codes.float() * row_scale)


def test_exact_ties_round_half_to_even_so_half_the_scale_becomes_zero() -> None:
    # mean|W| is exactly 1, and 0.5 is half of it; 1.5 is the other tie, which clips.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.5, -0.5, 1.5, -1.5]])
    codes = ternarise(weight)
    assert codes.scale.tolist() == [1.0]
    assert codes.codes.tolist() == [[0, 0, 1, -1], [0, 0, 1, -1]]
    just_above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    weight[0, 0], weight[0, 1] = just_above, -just_above
    assert absmean_scale(weight, 1).item() == 1.0
    assert ternarise(weight).codes[0].tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 1.3])
def test_threshold_moves_the_border_and_leaves_the_scale(threshold: float) -> None:
    weight = torch.randn(8, 64)
    codes = ternarise(weight, threshold)
    scale = torch.from_numpy(textbook_scale(weight, 1))
    assert torch.equal(codes.scale, scale)
    expected = torch.where(weight.abs() / scale > threshold, weight.sign(), 0.0)
    assert torch.equal(codes.codes.float(), expected)


def test_scale_is_the_float64_mean_rounded_once() -> None:
    # A float32 running sum loses the small values next to a large one; the float64 sum keeps them.
    weight = torch.full((1, 2**20), 1e-4)
    weight[0, 0] = 3e3
    exact = np.float32((3e3 + (2**20 - 1) * float(np.float32(1e-4))) / 2**20)
    assert absmean_scale(weight, 1).item() == pytest.approx(float(exact), rel=1e-7, abs=0)
    assert np.float32(absmean_scale(weight, 1).item()) == np.float32(np.abs(weight.numpy().astype(np.float64)).mean())


def test_order_of_the_sum_flips_no_code() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 513, generator=generator) * torch.rand(64, 1, generator=generator).exp()
    reference = ternarise(weight)
    for seed in range(5):
        order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
        shuffled = ternarise(weight.flatten()[order].reshape(weight.shape))
        assert torch.equal(shuffled.scale, reference.scale)
        assert torch.equal(shuffled.codes.flatten(), reference.codes.flatten()[order])
    transposed = weight.t().contiguous().t()  # the same values in another memory order
    assert torch.equal(ternarise(transposed).codes, reference.codes)
    assert torch.equal(ternarise(transposed).scale, reference.scale)


@pytest.mark.parametrize("quantise", [ternarise, lambda w: binarise(w)])
def test_zero_weights_get_the_floor_as_scale(quantise) -> None:  # type: ignore[no-untyped-def]
    codes = quantise(torch.zeros(4, 4))
    assert codes.scale.item() == np.float32(1e-5)
    assert bool(torch.isfinite(codes.dequantise()).all())


def test_tiny_weights_are_clamped_at_the_floor_both_ways() -> None:
    # mean|W| = 4e-6 < 1e-5: the ratio uses the clamped scale, 0.4, so every code is 0.
    assert int(ternarise(torch.full((4, 4), 4e-6)).codes.abs().sum()) == 0
    assert ternarise(torch.full((4, 4), 6e-6)).codes.unique().tolist() == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_a_bad_weight_shows_in_its_group_and_only_there(bad: float, scheme: str) -> None:
    weight = torch.randn(6, 8)
    weight[1, 3] = bad
    values = quantise_weight(weight, LayerQuant(scheme, groups=3)).dequantise()
    assert not bool(torch.isfinite(values[:2]).any())
    assert bool(torch.isfinite(values[2:]).all())


@pytest.mark.parametrize("groups", GROUPS)
def test_binary_codes_are_the_sign_around_the_group_mean(groups: int) -> None:
    weight = torch.randn(12, 37) + torch.linspace(-2, 2, 12)[:, None]
    codes = binarise(weight, groups)
    blocks = weight.numpy().astype(np.float64).reshape(groups, -1)
    alpha = torch.from_numpy(blocks.mean(axis=1).astype(np.float32)).repeat_interleave(12 // groups)[:, None]
    assert torch.equal(codes.codes, torch.where(weight - alpha >= 0, 1, -1).to(torch.int8))
    assert torch.equal(codes.scale, torch.from_numpy(textbook_scale(weight, groups)))


def test_sign_of_zero_is_plus_one_in_binary() -> None:
    # The mean is exactly 2, which two of the weights equal.
    assert binarise(torch.tensor([[1.0, 2.0, 2.0, 3.0]])).codes.tolist() == [[-1, 1, 1, 1]]
    assert binarise(torch.zeros(2, 2)).codes.unique().tolist() == [1]


def test_row_groups_have_one_scale_per_output_row() -> None:
    weight = torch.randn(5, 16) * torch.arange(1, 6)[:, None]
    codes = quantise_weight(weight, LayerQuant(groups="row"))
    assert torch.equal(codes.scale, torch.cat([ternarise(row[None]).scale for row in weight]))
    assert torch.equal(codes.codes, torch.cat([ternarise(row[None]).codes for row in weight]))


def test_groups_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"groups=4 does not divide the 6"):
        quantise_weight(torch.randn(6, 4), LayerQuant(groups=4))


def test_a_float_layer_has_no_codes() -> None:
    with pytest.raises(ValueError, match="float"):
        quantise_weight(torch.randn(4, 4), LayerQuant("float"))


def test_quantising_leaves_the_master_weight_and_takes_no_gradient() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    before = weight.detach().clone()
    for scheme in ("ternary", "binary"):
        codes = quantise_weight(weight, LayerQuant(scheme))
        assert not codes.scale.requires_grad
    assert torch.equal(weight.detach(), before)
