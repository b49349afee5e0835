"""Weight gradients from codes, against float64 products and the oracle of block scales."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.triton import weight_gradient
from bitnet_train.kernels.triton.weight_gradient import (
    block_weight_gradient,
    token_parts,
    transpose_codes,
)
from bitnet_train.kernels.triton.weight_gradient import (
    weight_gradient as gradient,
)
from bitnet_train.quant import gradients
from bitnet_train.quant.activations import TokenCodes, quantise_tokens

SHAPES = [(1, 1, 1), (3, 17, 1), (33, 1, 3), (32, 16, 16), (50, 37, 19), (131, 16, 32), (300, 20, 33)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]


def tokens(m: int, k: int) -> TokenCodes:
    return quantise_tokens(torch.randn(m, k) * torch.logspace(-1, 1, m)[:, None])


def check(got: Tensor, dy: Tensor, x: TokenCodes, dtype: torch.dtype) -> None:
    """``got`` is the product of the operands rounded to ``dtype``, up to float32 rounding of the sum."""
    operands = dy.to(dtype).double().t(), x.dequantise().to(dtype).double()
    assert got.dtype is torch.float32
    error = (got.cpu().double() - operands[0] @ operands[1]).abs()
    assert bool((error <= 1e-6 * (operands[0].abs() @ operands[1].abs()) + 1e-30).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dy_dtype", [torch.bfloat16, torch.float32])
def test_operands_are_rounded_to_the_type_and_summed_in_float32(
    shape: tuple[int, int, int], dtype: torch.dtype, dy_dtype: torch.dtype, way: str, device: torch.device
) -> None:
    m, k, n = shape
    dy, x = torch.randn(m, n).to(dy_dtype), tokens(m, k)
    check(gradient(dy.to(device), x.codes.to(device), x.scale.to(device), dtype), dy, x, dtype)


@pytest.mark.parametrize("m", [100, 128, 129, 400, 640])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_the_tokens_add_up(m: int, parts: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(weight_gradient, "token_parts", lambda *_: parts)
    dy, x = torch.randn(m, 17).bfloat16(), tokens(m, 19)
    arguments = dy.to(device), x.codes.to(device), x.scale.to(device), torch.bfloat16
    check(gradient(*arguments), dy, x, torch.bfloat16)
    assert torch.equal(gradient(*arguments), gradient(*arguments))


def test_parts_fill_the_gpu_and_are_worth_their_traffic() -> None:
    assert token_parts(16_384, 6912, 2560, 132) == 1  # eight waves
    assert token_parts(16_384, 640, 640, 132) > 4  # 25 tiles for 132 multiprocessors
    assert token_parts(1024, 640, 640, 132) == 1  # too few tokens
    assert token_parts(1, 1, 1, 132) == 1
    assert all(1 <= token_parts(m, 256, 256, 108) <= 8 for m in range(1, 40_000, 997))


def test_bad_values_show_where_they_belong(device: torch.device) -> None:
    dy, x = torch.randn(40, 18).bfloat16(), tokens(40, 20)
    dy[3, 5] = float("nan")
    bad = gradient(dy.to(device), x.codes.to(device), x.scale.to(device), torch.bfloat16).isnan()
    assert bool(bad[5].all())
    assert int(bad.sum()) == 20
    x.scale[39] = float("nan")  # a token with a NaN is in every sum
    assert bool(gradient(dy.to(device), x.codes.to(device), x.scale.to(device), torch.bfloat16).isnan().all())
    # An infinity of the first token must not meet the rows read as padding.
    dy = torch.ones(17, 16)
    dy[0] = float("inf")
    ones = torch.ones(17, 16, dtype=torch.int8)
    got = gradient(dy.to(device), ones.to(device), torch.ones(17, 1, device=device), torch.float32)
    assert bool(got.isposinf().all())


def test_strides_do_not_matter(way: str, device: torch.device) -> None:
    m, n, k = 45, 32, 48
    dy, x = torch.randn(m, n).bfloat16().to(device), tokens(m, k)
    codes, scale = x.codes.to(device), x.scale.to(device)
    plain = gradient(dy, codes, scale, torch.bfloat16)
    wide = torch.zeros(m, n + 32, dtype=torch.bfloat16, device=device)
    wide[:, 16:-16] = dy
    for other_dy in (dy.t().contiguous().t(), wide[:, 16:-16]):
        assert torch.equal(gradient(other_dy, codes.t().contiguous().t(), scale, torch.bfloat16), plain)
    expanded = torch.ones(1, 1, device=device).expand(m, n)  # the gradient of a sum
    assert torch.equal(
        gradient(expanded, codes, scale, torch.float32), gradient(expanded.contiguous(), codes, scale, torch.float32)
    )


@pytest.mark.parametrize("shape", [(1, 1), (127, 3), (128, 64), (129, 65), (300, 17)])
def test_transposed_codes_are_padded_with_zeros(shape: tuple[int, int], device: torch.device) -> None:
    m, columns = shape
    codes = torch.randint(-128, 128, (m, columns + 3), dtype=torch.int8)[:, 1:-2]
    out = transpose_codes(codes.to(device)).cpu()
    assert out.shape == (columns, (m + 127) // 128 * 128)
    assert torch.equal(out[:, :m], codes.t())
    assert not bool(out[:, m:].any())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (127, 5, 17), (128, 16, 16), (129, 17, 33), (400, 19, 18)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (True, True)])
def test_block_gradients_are_the_oracles_bit_for_bit(
    shape: tuple[int, int, int], transposed: tuple[bool, bool], way: str, device: torch.device
) -> None:
    m, n, k = shape
    x = tokens(m, k)
    codes, scale = gradients.quantise_gradient_blocks(torch.randn(m, n), x.scale)
    expected = gradients.block_weight_gradient(codes, scale, x.codes)
    operands = [
        (t.t().contiguous().t() if turned else t).to(device)
        for t, turned in zip((codes, x.codes), transposed, strict=True)
    ]
    assert torch.equal(block_weight_gradient(operands[0], scale.to(device), operands[1]).cpu(), expected)


def test_a_nan_block_scale_gives_a_nan_row(device: torch.device) -> None:
    x, grad = tokens(200, 18), torch.randn(200, 17)
    grad[150, 4] = float("nan")
    codes, scale = gradients.quantise_gradient_blocks(grad, x.scale)
    bad = block_weight_gradient(codes.to(device), scale.to(device), x.codes.to(device)).isnan()
    assert bool(bad[4].all())
    assert int(bad.sum()) == 18


def test_no_tokens_give_zeros(device: torch.device) -> None:
    codes, scale = torch.empty(0, 6, dtype=torch.int8, device=device), torch.empty(0, 1, device=device)
    dy = torch.empty(0, 4, device=device)
    assert torch.equal(gradient(dy, codes, scale, torch.bfloat16).cpu(), torch.zeros(4, 6))
    empty = torch.empty(0, 4, dtype=torch.int8, device=device)
    assert torch.equal(block_weight_gradient(empty, torch.empty(0, 4, device=device), codes).cpu(), torch.zeros(4, 6))
