"""How output gradients are rounded for low-precision gradient matmuls, and how much that loses."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.backend import WeightCodes
from bitnet_train.kernels.reference import ReferenceBackend
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.gradients import (
    BLOCK_TOKENS,
    FP8,
    block_weight_gradient,
    quantise_gradient_blocks,
    quantise_gradient_rows,
)
from bitnet_train.quant.weights import ternarise


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e8])
def test_rows_fill_the_range_of_the_type(dtype: torch.dtype, size: float) -> None:
    grad, row_scale = torch.randn(20, 50) * size, torch.rand(50) + 0.5
    codes, scale = quantise_gradient_rows(grad, row_scale, dtype)
    assert codes.dtype is dtype
    assert scale.shape == (20, 1)
    largest = 127 if dtype is torch.int8 else 448
    assert torch.equal(codes.float().abs().amax(1), torch.full((20,), float(largest)))
    error = (codes.float() * scale - grad * row_scale).abs()
    step = scale / 2 if dtype is torch.int8 else (grad * row_scale).abs() / 16 + scale * 2**-10
    assert bool((error <= step * 1.001).all())


def test_codes_round_half_to_even() -> None:
    codes, scale = quantise_gradient_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]]), torch.ones(5))
    assert codes.tolist() == [[127, 0, 2, -2, -127]]
    assert scale.tolist() == [[1.0]]


def test_zero_rows_are_zeros_and_bad_rows_have_a_nan_scale() -> None:
    grad = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [2.0, -1.0]])
    for dtype in (torch.int8, FP8):
        codes, scale = quantise_gradient_rows(grad, torch.ones(2), dtype)
        assert scale.isnan().flatten().tolist() == [False, True, True, False]
        assert codes[0].float().tolist() == [0.0, 0.0]
        assert bool((scale[0] > 0).all())


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_blocks_are_128_tokens_and_the_last_may_be_shorter(tokens: int) -> None:
    grad, scale_x = torch.randn(tokens, 7) * 1e-6, torch.rand(tokens, 1)
    codes, scale = quantise_gradient_blocks(grad, scale_x)
    assert codes.shape == grad.shape
    assert scale.shape == (-(-tokens // BLOCK_TOKENS), 7)
    per_token = scale.repeat_interleave(BLOCK_TOKENS, 0)[:tokens]
    assert bool(((codes.float() * per_token - grad * scale_x).abs() <= per_token / 2 * 1.001).all())


def test_a_bad_token_spoils_its_columns_of_its_block_only() -> None:
    grad = torch.randn(300, 4)
    grad[200, 2] = float("nan")
    codes, scale = quantise_gradient_blocks(grad, torch.ones(300, 1))
    assert scale.isnan().nonzero().tolist() == [[1, 2]]
    gradient = block_weight_gradient(codes, scale, torch.ones(300, 3, dtype=torch.int8))
    assert gradient.isnan().any(1).tolist() == [False, False, True, False]


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t with three degrees of freedom, with rows of different sizes: what output gradients look like."""
    return torch.distributions.StudentT(3.0).sample(torch.Size(shape)) * torch.rand(shape[0], 1) * 1e-4


def decibels(got: Tensor, exact: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (got.double() - exact).norm()))


@pytest.mark.parametrize(
    ("matmul", "precision", "gaussian", "heavy"),
    [
        ("dx", "bf16", 50, 50),
        ("dx", "int8", 41, 24),
        ("dx", "fp8", 31, 31),
        ("dw", "bf16", 50, 50),
        ("dw", "int8", 32, 28),
    ],
)
def test_signal_to_noise(matmul: str, precision: str, gaussian: float, heavy: float) -> None:
    """At least the decibels against the exact straight-through gradient that the precision is known for."""
    tokens, k, n = 512, 256, 384
    x, codes = quantise_tokens(torch.randn(tokens, k)), ternarise(torch.randn(n, k))
    weights = WeightCodes(codes.codes, codes.row_scale())
    reference = ReferenceBackend()
    for grad, least in ((torch.randn(tokens, n), gaussian), (heavy_tailed(tokens, n), heavy)):
        wide = grad.double()
        if matmul == "dx":
            got = reference.grad_input([grad], weights, precision, torch.float32)
            exact = (wide * weights.row_scale.double()) @ codes.codes.double()
        else:
            (got,) = reference.grad_weight([grad], x, precision)
            exact = wide.t() @ (x.codes.double() * x.scale.double())
        assert decibels(got, exact) > least
