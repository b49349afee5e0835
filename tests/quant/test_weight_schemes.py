"""Medians, symmetric weights of 2 to 8 bits, groups of rows and learned scales against their formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.quant.spec import SYMMETRIC_BITS, LayerQuant
from bitnet_train.quant.weights import (
    SCALE_FLOOR,
    Codes,
    masters_from_codes,
    quantise_weight,
    scale_gradient,
    statistic_scale,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GROUPS = [{"groups": 1}, {"groups": 3}, {"groups": "row"}, {"group_rows": 1}, {"group_rows": 4}, {"group_rows": 12}]


def uneven(rows: int = 12, columns: int = 37) -> Tensor:
    return torch.randn(rows, columns) * torch.linspace(0.01, 3, rows)[:, None]


def blocks_of(weight: Tensor, layer: LayerQuant) -> np.ndarray:
    """Magnitudes of every group in float64, (groups, weights of a group)."""
    return np.abs(weight.float().numpy().astype(np.float64)).reshape(layer.group_count(len(weight)), -1)


@pytest.mark.parametrize("fields", GROUPS)
def test_groups_of_rows_are_another_way_to_count_groups(fields: dict[str, object]) -> None:
    layer, weight = LayerQuant(**fields), uneven()  # type: ignore[arg-type]
    codes = quantise_weight(weight, layer)
    count = {1: 12, 4: 3, 12: 1}[fields["group_rows"]] if "group_rows" in fields else layer.group_count(12)  # type: ignore[index]
    assert codes.scale.shape == (count,)
    parts = [quantise_weight(part, LayerQuant()) for part in weight.split(12 // count)]
    assert torch.equal(codes.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(codes.scale, torch.cat([part.scale for part in parts]))


def test_rows_that_a_group_does_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"group_rows=5 does not divide the 12 output rows"):
        quantise_weight(uneven(), LayerQuant(group_rows=5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 36, 37])
@pytest.mark.parametrize("fields", GROUPS)
def test_the_median_is_the_lower_middle_of_the_magnitudes(
    dtype: torch.dtype, columns: int, fields: dict[str, object]
) -> None:
    layer, weight = LayerQuant(statistic="absmedian", **fields), uneven(12, columns).to(dtype)  # type: ignore[arg-type]
    ordered = np.sort(blocks_of(weight, layer), axis=1)
    middle = ordered[:, (ordered.shape[1] - 1) // 2].astype(np.float32)
    wanted = torch.from_numpy(np.maximum(middle, np.float32(SCALE_FLOOR)))
    codes = quantise_weight(weight, layer)
    assert torch.equal(codes.scale, wanted)
    rows = wanted.repeat_interleave(12 // len(wanted))[:, None]
    assert torch.equal(codes.codes, torch.round(weight.float() / rows).clamp(-1, 1).to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("statistic", ["absmax", "absmean"])
@pytest.mark.parametrize("bits", SYMMETRIC_BITS)
@pytest.mark.parametrize("fields", GROUPS)
def test_symmetric_codes_are_the_rounded_and_clipped_ratio(
    dtype: torch.dtype, statistic: str, bits: int, fields: dict[str, object]
) -> None:
    layer = LayerQuant("symmetric", bits=bits, statistic=statistic, **fields)  # type: ignore[arg-type]
    weight = uneven().to(dtype)
    largest = {2: 1, 3: 3, 4: 7, 8: 127}[bits]
    assert layer.largest_code == largest
    blocks = blocks_of(weight, layer)
    if statistic == "absmax":
        wanted = blocks.max(1).astype(np.float32) / np.float32(largest)
    else:  # what LSQ starts from: 2 <|w|> / sqrt(Q)
        wanted = blocks.mean(1).astype(np.float32) * np.float32(2 / math.sqrt(largest))
    codes = quantise_weight(weight, layer)
    assert codes.codes.dtype is torch.int8
    assert torch.equal(codes.scale, torch.from_numpy(wanted))
    rows = codes.row_scale()[:, None]
    assert torch.equal(codes.codes, torch.round(weight.float() / rows).clamp(-largest, largest).to(torch.int8))
    if statistic == "absmax":  # every group reaches the largest code, and nothing is off by more than half a step
        assert codes.codes.abs().reshape(len(wanted), -1).amax(1).tolist() == [largest] * len(wanted)
        error = (codes.dequantise().double() - weight.double()).abs()
        assert bool((error <= rows.double() * 0.50001).all())


@pytest.mark.parametrize("bits", SYMMETRIC_BITS)
def test_symmetric_ties_round_half_to_even(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5, 2.5, float(largest)]]).clamp(-largest, largest)
    codes = quantise_weight(weight, LayerQuant("symmetric", bits=bits))
    assert codes.scale.item() == 1.0
    assert codes.codes.tolist() == [[round(w) for w in weight[0].tolist()]]  # Python rounds half to even


def test_two_bits_by_the_largest_magnitude_are_not_ternary() -> None:
    weight = uneven()
    two, ternary = quantise_weight(weight, LayerQuant("symmetric", bits=2)), quantise_weight(weight, LayerQuant())
    assert set(two.codes.unique().tolist()) == {-1, 0, 1}
    assert two.scale.item() == weight.abs().max().item()
    assert not torch.equal(two.codes, ternary.codes)


EVERY = [
    LayerQuant(),
    LayerQuant(statistic="absmedian"),
    LayerQuant("binary"),
    LayerQuant("binary", statistic="absmedian"),
    *(LayerQuant("symmetric", bits=b, statistic=s) for b in SYMMETRIC_BITS for s in ("absmax", "absmean")),
]


@pytest.mark.parametrize("layer", EVERY, ids=str)
def test_zeros_have_the_floor_as_scale(layer: LayerQuant) -> None:
    codes = quantise_weight(torch.zeros(4, 6), layer)
    twice = layer.statistic == "absmean" and layer.bits is not None and layer.bits < 4  # 2 |w| / sqrt(1 or 3)
    factor = 2 / math.sqrt(layer.largest_code) if twice else 1
    assert codes.scale.item() == pytest.approx(SCALE_FLOOR * factor, rel=1e-6)
    assert codes.codes.unique().tolist() == ([1] if layer.scheme == "binary" else [0])


@pytest.mark.parametrize("value", [3.0, -0.25])
@pytest.mark.parametrize("layer", EVERY, ids=str)
def test_equal_weights(layer: LayerQuant, value: float) -> None:
    codes = quantise_weight(torch.full((4, 6), value), layer)
    largest = layer.largest_code
    if layer.scheme == "binary":  # none is below the mean of all
        assert codes.codes.unique().tolist() == [1]
    elif layer.scheme == "symmetric" and layer.statistic == "absmean":
        wanted = min(largest, round(math.sqrt(largest) / 2))  # w / (2 w / sqrt Q)
        assert codes.codes.unique().tolist() == ([0] if not wanted else [math.copysign(wanted, value)])
    else:
        assert codes.codes.unique().tolist() == [math.copysign(largest, value)]
        assert torch.allclose(codes.dequantise(), torch.full((4, 6), value), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", EVERY, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_a_weight_that_is_not_finite_shows_in_every_output_of_its_group(
    layer: LayerQuant, learned: bool, bad: float
) -> None:
    weight = torch.randn(6, 8)
    weight[1, 3] = bad
    codes = quantise_weight(weight, replace(layer, groups=3), torch.ones(3) if learned else None)
    outputs = codes.dequantise() @ torch.randn(8)
    assert not bool(torch.isfinite(outputs[:2]).any())
    assert bool(torch.isfinite(outputs[2:]).all())


# --- learned scales ---


def lsq(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    """The quantised weights as LSQ's authors write them (arXiv 1902.08153, appendix A), without the gradient scale."""
    clipped = (weight.reshape(len(scale), -1) / scale[:, None]).clamp(-largest, largest)
    rounded = clipped + (clipped.round() - clipped).detach()
    return (rounded * scale[:, None]).reshape(weight.shape)


@pytest.mark.parametrize("bits", SYMMETRIC_BITS)
@pytest.mark.parametrize("groups", [1, 2, "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_scale_is_autograds_through_lsq(bits: int, groups: int | str, dtype: torch.dtype) -> None:
    layer = LayerQuant("symmetric", bits=bits, groups=groups, statistic="absmean")
    weight, grad = torch.randn(6, 50).to(dtype), torch.randn(6, 50).to(dtype)
    scale = statistic_scale(weight, layer) * (0.15 if bits == 8 else 0.5)  # so that a good part is clipped
    codes = quantise_weight(weight, layer, scale)
    largest = layer.largest_code
    assert bool((weight.float().reshape(len(scale), -1) / scale[:, None]).abs().max() > largest)
    learned = scale.double().requires_grad_()
    values = lsq(weight.double(), learned, largest)
    assert torch.allclose(values.detach(), codes.dequantise().double(), rtol=1e-6)
    values.backward(grad.double())
    assert learned.grad is not None
    wanted = learned.grad / math.sqrt(weight.numel() / len(scale) * largest)
    got = scale_gradient(weight, grad, codes, largest)
    assert got.dtype is torch.float32
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_the_gradient_of_a_ternary_and_of_a_binary_scale() -> None:
    # w/s = 2 (beyond: the code), 0.4 (inside: 0 - 0.4), -0.7 (inside: -1 + 0.7), -3 (beyond).
    weight, grad = torch.tensor([[2.0, 0.4, -0.7, -3.0]]), torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    scale = torch.ones(1)
    ternary = quantise_weight(weight, LayerQuant(), scale)
    expected = (1 * 1 + 10 * -0.4 + 100 * -0.3 + 1000 * -1) / math.sqrt(4)
    assert scale_gradient(weight, grad, ternary, 1).item() == pytest.approx(expected, rel=1e-6)
    binary = Codes(torch.tensor([[1, 1, -1, -1]], dtype=torch.int8), scale)
    expected = (1 * 1 + 10 * 0.6 + 100 * -0.3 + 1000 * -1) / math.sqrt(4)
    assert scale_gradient(weight, grad, binary, 1).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layer", EVERY, ids=str)
def test_a_given_scale_takes_the_place_of_the_statistic(layer: LayerQuant) -> None:
    weight = torch.randn(6, 20)
    given = torch.nn.Parameter(torch.tensor([0.3, 0.9]))
    codes = quantise_weight(weight, LayerQuant(layer.scheme, bits=layer.bits, groups=2), given)
    assert torch.equal(codes.scale, given.data)
    assert not codes.scale.requires_grad
    if layer.scheme != "binary":
        rows = codes.row_scale()[:, None]
        largest = layer.largest_code
        assert torch.equal(codes.codes, torch.round(weight / rows).clamp(-largest, largest).to(torch.int8))
    below = quantise_weight(weight, LayerQuant(groups=2), torch.tensor([-1.0, 0.0]))
    assert below.scale.tolist() == [np.float32(SCALE_FLOOR)] * 2  # a scale that learning drove below zero


@pytest.mark.parametrize(
    "layer",
    [
        LayerQuant("symmetric", bits=4),
        LayerQuant("symmetric", bits=8, groups="row"),
        LayerQuant("symmetric", bits=2, group_rows=2),
        LayerQuant(trainable_scale=True),
        LayerQuant("binary", trainable_scale=True),
    ],
    ids=str,
)
def test_masters_give_their_codes_back(layer: LayerQuant) -> None:
    codes = quantise_weight(torch.randn(6, 40), layer)
    masters = masters_from_codes(codes, layer)
    again = quantise_weight(masters, layer, codes.scale if layer.trainable_scale else None)
    assert torch.equal(again.scale, codes.scale)
    if layer.scheme != "binary" or not layer.trainable_scale:
        assert torch.equal(again.codes, codes.codes)


def test_codes_that_reach_no_largest_are_no_masters() -> None:
    codes = Codes(torch.tensor([[3, -2]], dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="none that the layer's quantiser makes"):
        masters_from_codes(codes, LayerQuant("symmetric", bits=4))
