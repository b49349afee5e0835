"""Inputs of 2 to 8 bits by the largest or the mean magnitude, of a token, a group or a batch, whole or sparse."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_train.quant.activations import ABSMAX_FLOOR, TokenCodes, quantise_inputs, quantise_tokens
from bitnet_train.quant.spec import InputQuant
from tests.operands import random_input

GROUP = 8
STATISTICS, GRANULARITIES = ("absmax", "absmean"), ("token", "group", "tensor")
KINDS = list(itertools.product(range(2, 9), STATISTICS, GRANULARITIES))


def kind(bits: int, statistic: str, granularity: str, **more: object) -> InputQuant:
    group = GROUP if granularity == "group" else None
    return InputQuant(bits, statistic, granularity, group, **more)  # type: ignore[arg-type]


def formula(x: Tensor, inputs: InputQuant) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale of every value, and by how far each ratio missed the next tie, in float64 NumPy."""
    values = x.float().numpy().astype(np.float64)
    largest = 2 ** (inputs.bits - 1) - 1  # type: ignore[operator]
    spans = values.reshape(len(values), -1, inputs.group_size or values.shape[1])
    axes = None if inputs.granularity == "tensor" else 2
    reach = (
        np.abs(spans).max(axis=axes, keepdims=True)
        if inputs.statistic == "absmax"
        else np.abs(spans).mean(axis=axes, keepdims=True) * math.sqrt(largest)
    )
    reach = np.maximum(reach, ABSMAX_FLOOR)
    ratio = spans * (largest / reach)
    from_tie = np.abs(ratio - np.floor(ratio) - 0.5)
    codes = np.clip(np.rint(ratio), -largest - 1, largest)
    scale = np.broadcast_to(reach / largest, spans.shape)
    return codes.reshape(values.shape), scale.reshape(values.shape), from_tie.reshape(values.shape)


def assert_formula(got: TokenCodes, x: Tensor, inputs: InputQuant) -> None:
    codes, scale, from_tie = formula(x, inputs)
    clear = torch.from_numpy(from_tie > 1e-4)  # float32 may round a tie to the other side
    assert bool((got.codes.double() == torch.from_numpy(codes))[clear].all())
    assert clear.float().mean() > 0.99
    assert bool(((got.codes.double() - torch.from_numpy(codes)).abs() <= 1).all())
    wanted = torch.from_numpy(scale.copy())
    spread = got.scale.repeat_interleave(x.shape[1] // got.scale.shape[1], 1).double()
    assert torch.allclose(spread, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("bits", "statistic", "granularity"), KINDS)
def test_codes_and_scales_are_the_formula(bits: int, statistic: str, granularity: str, dtype: torch.dtype) -> None:
    inputs, x = kind(bits, statistic, granularity), random_input(20, 40, dtype=dtype)
    got = quantise_inputs(x, inputs)
    assert got.codes.dtype is torch.int8
    assert got.scale.dtype is torch.float32
    assert got.scale.shape == (20, 40 // GROUP if granularity == "group" else 1)
    assert got.scale.is_contiguous()
    assert_formula(got, x, inputs)
    largest = 2 ** (bits - 1) - 1
    if statistic == "absmax":
        assert int(got.codes.abs().max()) == largest
    elif bits < 5:  # mean|x| sqrt(largest) lies below the largest of many values: some are clipped, at -largest - 1
        assert (int(got.codes.min()), int(got.codes.max())) == (-largest - 1, largest)


def test_eight_bits_per_token_are_bitnets_own() -> None:
    x = random_input(30, 17)
    for got, wanted in zip(quantise_inputs(x, InputQuant()), quantise_tokens(x), strict=True):
        assert torch.equal(got, wanted)


def test_the_equation_of_a4_8() -> None:
    # arXiv 2411.04965, equation 2: b / sqrt(7) * clip(round(sqrt(7) / b * x), -8, 7), b = mean|x|
    x = torch.randn(50, 64, dtype=torch.float64)
    b = x.abs().mean(-1, keepdim=True)
    wanted = b / math.sqrt(7) * torch.clamp(torch.round(math.sqrt(7) / b * x), -8, 7)
    got = quantise_inputs(x, InputQuant(4, "absmean")).dequantise()
    assert ((got.double() - wanted).abs() > 1e-5).float().mean() < 1e-3  # ties
    assert torch.allclose(got.double().norm(), wanted.norm(), rtol=1e-3)


def test_a_group_is_a_token_of_its_own() -> None:
    x = random_input(9, 40)
    for bits, statistic in itertools.product((3, 4, 8), STATISTICS):
        together = quantise_inputs(x, InputQuant(bits, statistic, "group", GROUP))
        apart = quantise_inputs(x.reshape(-1, GROUP), InputQuant(bits, statistic))
        assert torch.equal(together.codes, apart.codes.reshape(9, 40))
        assert torch.equal(together.scale, apart.scale.reshape(9, 5))
        assert torch.equal(together.dequantise(), apart.dequantise().reshape(9, 40))


def test_one_group_as_wide_as_the_token_is_the_token() -> None:
    x = random_input(9, 40)
    one = quantise_inputs(x, InputQuant(4, "absmax", "group", 40))
    for got, wanted in zip(one, quantise_inputs(x, InputQuant(4)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_tensor_shares_one_scale_whatever_its_shape(statistic: str) -> None:
    x = random_input(2 * 5, 12)
    flat = quantise_inputs(x, InputQuant(8, statistic, "tensor"))
    assert len(flat.scale.unique()) == 1
    whole = quantise_inputs(x.reshape(1, -1), InputQuant(8, statistic, "group", x.numel()))
    assert torch.equal(flat.codes.flatten(), whole.codes.flatten())
    deep = quantise_inputs(x.reshape(2, 5, 12), InputQuant(8, statistic, "tensor"))
    assert deep.scale.shape == (2, 5, 1)
    assert torch.equal(deep.dequantise().reshape(10, 12), flat.dequantise())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_more_dimensions_are_more_tokens(granularity: str) -> None:
    x = random_input(6, 24).reshape(2, 3, 24)
    inputs = kind(4, "absmean", granularity)
    deep, flat = quantise_inputs(x, inputs), quantise_inputs(x.reshape(6, 24), inputs)
    assert torch.equal(deep.codes.reshape(6, 24), flat.codes)
    assert torch.equal(deep.scale.reshape(flat.scale.shape), flat.scale)
    assert torch.equal(deep.dequantise().reshape(6, 24), flat.dequantise())


@pytest.mark.parametrize(("share", "kept"), [(0.5, 20), (0.01, 1), (0.99, 40), (0.3, 12)])
@pytest.mark.parametrize(("bits", "statistic", "granularity"), [(8, "absmax", "token"), (4, "absmean", "group")])
def test_top_k_keeps_the_largest_magnitudes(
    share: float, kept: int, bits: int, statistic: str, granularity: str
) -> None:
    x = random_input(15, 40)
    order = x.abs().argsort(dim=1, descending=True)
    mask = torch.zeros_like(x).scatter(1, order[:, :kept], 1.0)
    sparse = quantise_inputs(x, kind(bits, statistic, granularity, top_k=share))
    for got, wanted in zip(sparse, quantise_inputs(x * mask, kind(bits, statistic, granularity)), strict=True):
        assert torch.equal(got, wanted)
    assert bool((sparse.codes[mask == 0] == 0).all())


def test_top_k_of_equal_magnitudes_keeps_them_all() -> None:
    x = torch.tensor([[2.0, -2.0, 2.0, 1.0]])
    assert quantise_inputs(x, InputQuant(top_k=0.5)).codes.tolist() == [[127, -127, 127, 0]]


@pytest.mark.parametrize(("bits", "statistic", "granularity"), KINDS)
@pytest.mark.parametrize("top_k", [1.0, 0.5])
def test_zeros_stay_zeros_with_a_finite_scale(bits: int, statistic: str, granularity: str, top_k: float) -> None:
    x = torch.randn(4, 16)
    x[1] = 0
    got = quantise_inputs(x, kind(bits, statistic, granularity, top_k=top_k))
    assert bool(torch.isfinite(got.scale).all())
    assert not bool(got.codes[1].any())
    nothing = quantise_inputs(torch.zeros(2, 16), kind(bits, statistic, granularity))
    assert torch.allclose(nothing.scale, torch.full_like(nothing.scale, ABSMAX_FLOOR / (2 ** (bits - 1) - 1)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("bits", "statistic", "granularity"), KINDS)
@pytest.mark.parametrize("top_k", [1.0, 0.5])
def test_a_bad_value_shows_in_its_token(bits: int, statistic: str, granularity: str, bad: float, top_k: float) -> None:
    x = torch.randn(4, 16)
    x[2, 9] = bad
    inputs = kind(bits, statistic, granularity, top_k=top_k)
    outputs = quantise_inputs(x, inputs).dequantise().sum(1)
    others = [0, 1, 3]
    assert bool(outputs[2].isnan())
    if granularity == "tensor":
        assert bool(outputs.isnan().all())  # they share the scale
    else:
        clean = quantise_inputs(x[others], inputs).dequantise().sum(1)
        assert torch.equal(outputs[others], clean)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_tokens_give_no_codes(granularity: str) -> None:
    got = quantise_inputs(torch.zeros(0, 16), kind(4, "absmax", granularity))
    assert got.codes.shape == (0, 16)
    assert got.dequantise().shape == (0, 16)


def test_strides_do_not_matter() -> None:
    x = random_input(40, 16).t()
    for bits, statistic, granularity in KINDS:
        inputs = kind(bits, statistic, granularity, top_k=0.7)
        strided, dense = quantise_inputs(x, inputs), quantise_inputs(x.contiguous(), inputs)
        assert torch.equal(strided.codes, dense.codes)
        assert torch.allclose(strided.scale, dense.scale, rtol=1e-6, atol=0)  # a mean adds in the order of memory
