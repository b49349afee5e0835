"""The activation quantiser against the reference formula, and what it does with awkward rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.quant.activations import quantise_tokens, rms_norm


def reference_codes(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``clip(round(x * s), -128, 127)`` and ``m / 127`` in float32 NumPy.

    ``127 / m`` in the reference code is PyTorch's ``number / tensor``, which is ``reciprocal(m) * 127``: two float32
    roundings, in a quarter of all rows another last bit than one division.
    """
    x32 = x.float().numpy()
    m = np.maximum(np.abs(x32).max(axis=-1, keepdims=True), np.float32(1e-5))
    factor = (np.float32(1) / m) * np.float32(127)
    return np.clip(np.rint(x32 * factor), -128, 127).astype(np.int8), m / np.float32(127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 7, 64, 257])
def test_codes_and_scales_are_the_reference_codes_bit_for_bit(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(400, width) * torch.logspace(-3, 3, 400)[:, None]).to(dtype)
    got = quantise_tokens(x)
    codes, scale = reference_codes(x)
    assert got.codes.dtype is torch.int8
    assert got.scale.dtype is torch.float32
    assert got.scale.shape == (400, 1)
    assert np.array_equal(got.codes.numpy(), codes)
    assert np.array_equal(got.scale.numpy(), scale)
    assert torch.equal(got.dequantise(), got.codes.float() * got.scale)


def test_codes_equal_those_of_transformers() -> None:
    from transformers.integrations.bitnet import BitLinear as TransformersBitLinear

    layer = TransformersBitLinear(64, 4, bias=False)
    x = torch.randn(300, 64) * torch.logspace(-3, 3, 300)[:, None]
    with torch.compiler.set_stance("force_eager"):
        codes, _ = layer.activation_quant(x)
    assert torch.equal(quantise_tokens(x).codes, codes)


def test_codes_round_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]])
    assert quantise_tokens(x).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64]]


def test_the_extremes_do_not_wrap_around() -> None:
    for sign in (1, -1):
        x = sign * (torch.rand(2000, 1) + 0.5) * torch.logspace(-4, 30, 2000)[:, None]
        codes = quantise_tokens(torch.cat((x, x * 0.5), dim=1)).codes
        assert bool((codes[:, 0] == sign * 127).all())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
def test_small_rows_come_back_at_their_value(size: float) -> None:
    # torchao clamps the inverse scale but dequantises with the unclamped one: 0.72 of the value at 1e-3.
    x = size * torch.tensor([[1.0, -0.5, 0.25, 0.0]])
    assert torch.allclose(quantise_tokens(x).dequantise(), x, rtol=0, atol=size / 250)


def test_rows_below_the_floor_are_quantised_with_the_floors_scale() -> None:
    x = 1e-6 * torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    got = quantise_tokens(x)
    assert got.codes.tolist() == [[13, -13, 6, 0]]
    assert torch.allclose(got.dequantise(), x, rtol=0, atol=1e-5 / 127 / 2 * 1.01)


def test_zero_rows_are_zero_and_finite() -> None:
    got = quantise_tokens(torch.zeros(3, 5))
    assert int(got.codes.abs().sum()) == 0
    assert got.scale.flatten().tolist() == [np.float32(1e-5) / np.float32(127)] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [1, 5, 16, 33, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_value_anywhere_makes_its_row_nan_and_no_other(bad: float, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(width, width).to(dtype)
    x[torch.arange(width), torch.arange(width)] = bad  # row i is bad at position i
    x = torch.cat((torch.randn(1, width).to(dtype), x, torch.randn(1, width).to(dtype)))
    got = quantise_tokens(x)
    assert bool(got.scale[1:-1].isnan().all())
    assert bool(got.dequantise()[1:-1].isnan().all())
    assert torch.equal(got.dequantise()[[0, -1]], quantise_tokens(x[[0, -1]]).dequantise())


def test_rows_are_independent_and_strides_do_not_matter() -> None:
    x = torch.randn(3, 4, 10)
    whole = quantise_tokens(x)
    assert whole.codes.shape == (3, 4, 10)
    assert whole.scale.shape == (3, 4, 1)
    for strided in (x.transpose(0, 1), x[:, ::2], x[..., ::3], x.permute(2, 0, 1)):
        dense = quantise_tokens(strided.contiguous())
        assert not strided.is_contiguous()
        assert torch.equal(quantise_tokens(strided).codes, dense.codes)
        assert torch.equal(quantise_tokens(strided).scale, dense.scale)
    assert torch.equal(quantise_tokens(x[1]).codes, whole.codes[1])


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=40))
def test_every_value_comes_back_within_half_a_step(values: list[float]) -> None:
    x = torch.tensor([values])
    got = quantise_tokens(x)
    assert bool(torch.isfinite(got.scale).all())
    error = (got.dequantise().double() - x.double()).abs()
    assert bool((error <= got.scale.double() * 0.50001).all())


def test_rms_norm_is_computed_in_float32() -> None:
    x, weight = torch.randn(7, 33).to(torch.bfloat16), torch.randn(33).to(torch.bfloat16)
    normed, rstd = rms_norm(x, weight, 1e-5)
    x64 = x.double()
    expected = x64 / (x64.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert normed.dtype is torch.float32
    assert torch.allclose(normed.double(), expected * weight.double(), rtol=1e-6, atol=1e-7)
    assert torch.allclose(x.float() * rstd, expected.float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(rms_norm(x, None, 1e-5)[0], x.float() * rstd)


def test_rms_norm_agrees_with_pytorch() -> None:
    x, weight = torch.randn(5, 40), torch.rand(40)
    expected = torch.nn.functional.rms_norm(x, (40,), weight, 1e-6)
    assert torch.allclose(rms_norm(x, weight, 1e-6)[0], expected, rtol=1e-6, atol=1e-6)


def test_the_norms_epsilon_counts() -> None:
    x = torch.full((1, 4), 1e-3)
    assert rms_norm(x, None, 1e-6)[0][0, 0].item() == pytest.approx(1e-3 / (2e-6) ** 0.5, rel=1e-5)
