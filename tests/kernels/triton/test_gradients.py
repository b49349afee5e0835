"""Triton's gradient quantisers against the oracle, bit for bit."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.triton.gradients import quantise_blocks, quantise_rows
from bitnet_train.quant.gradients import quantise_gradient_blocks, quantise_gradient_rows

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CODES = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(1, 1), (3, 1), (1, 5), (9, 31), (33, 130), (128, 64), (129, 65), (300, 7), (3, 2560)]


def random_gradient(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different and mostly small sizes, as gradients have."""
    return (torch.randn(*shape) * torch.logspace(-4, 1, shape[0])[:, None]).to(dtype)


def assert_same(codes: Tensor, scale: Tensor, expected_codes: Tensor, expected_scale: Tensor) -> None:
    """Bit for bit; fp8 by its bytes, which tell zeros apart."""
    assert codes.dtype is expected_codes.dtype
    assert scale.dtype is torch.float32
    assert torch.equal(codes.cpu().view(torch.int8), expected_codes.view(torch.int8))
    assert torch.equal(scale.cpu(), expected_scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16385)])
@pytest.mark.parametrize("to", CODES)
def test_rows_are_the_oracles(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype, to: torch.dtype
) -> None:
    grad, row_scale = random_gradient(*shape, dtype=dtype), torch.rand(shape[1]) + 0.01
    assert_same(*quantise_rows(grad.to(device), row_scale.to(device), to), *quantise_gradient_rows(grad, row_scale, to))


@pytest.mark.parametrize("to", CODES)
@pytest.mark.parametrize("width", [48, 16385])
def test_rows_without_a_row_scale(device: torch.device, to: torch.dtype, width: int) -> None:
    grad = random_gradient(5, width)
    assert_same(*quantise_rows(grad.to(device), None, to), *quantise_gradient_rows(grad, torch.ones(width), to))


@pytest.mark.parametrize("to", CODES)
def test_every_size_of_row_divides_alike(device: torch.device, to: torch.dtype) -> None:
    grad = torch.randn(2**14, 16) * torch.exp2(torch.rand(2**14, 1) * 240 - 120)
    ones = torch.ones(16)
    assert_same(*quantise_rows(grad.to(device), None, to), *quantise_gradient_rows(grad, ones, to))


def test_every_float8_rounds_to_nearest_even(device: torch.device) -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    grad = torch.cat([values, middles, torch.nextafter(middles, values[1:]), torch.nextafter(middles, values[:-1])])
    grad = torch.cat([grad, -grad, torch.tensor([448.0])])[None]  # the largest is 448, so that the scale is 1
    codes, scale = quantise_rows(grad.to(device), None, torch.float8_e4m3fn)
    assert scale.item() == 1.0
    assert torch.equal(codes.cpu().view(torch.uint8), grad.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_the_oracles(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    grad, scale_x = random_gradient(*shape, dtype=dtype), torch.rand(shape[0], 1) + 0.01
    assert_same(*quantise_blocks(grad.to(device), scale_x.to(device)), *quantise_gradient_blocks(grad, scale_x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("to", CODES)
@pytest.mark.parametrize("width", [9, 16387])
def test_a_bad_row_has_a_nan_scale_and_leaves_the_others(
    device: torch.device, bad: float, to: torch.dtype, width: int
) -> None:
    grad, row_scale = random_gradient(4, width), torch.rand(width) + 0.01
    grad[1, 0], grad[3, width - 1] = bad, bad
    codes, scale = quantise_rows(grad.to(device), row_scale.to(device), to)
    assert scale.flatten().isnan().tolist() == [False, True, False, True]
    assert_same(codes[::2], scale[::2], *quantise_gradient_rows(grad[::2], row_scale, to))


def test_bad_columns_of_a_block_have_nan_scales_and_leave_the_others(device: torch.device) -> None:
    grad, scale_x = random_gradient(260, 8), torch.rand(260, 1) + 0.01
    grad[3, 1], grad[130, 4], grad[200, 4] = float("nan"), float("inf"), float("-inf")
    scale_x[259] = float("nan")  # a token whose input was bad: every column of its block
    codes, scale = quantise_blocks(grad.to(device), scale_x.to(device))
    expected_codes, expected_scale = quantise_gradient_blocks(grad, scale_x)
    assert scale.cpu().isnan().nonzero().tolist() == [[0, 1], [1, 4], *([2, i] for i in range(8))]
    good = expected_scale.isfinite()
    assert torch.equal(scale.cpu()[good], expected_scale[good])
    rows = good.repeat_interleave(128, dim=0)[:260]
    assert torch.equal(codes.cpu()[rows], expected_codes[rows])


def test_zero_and_tiny_gradients_meet_the_floor(device: torch.device) -> None:
    grad = torch.tensor([[0.0, -0.0], [1e-30, -3e-31], [1e-38, 1e-45], [3e38, 1e38]])
    for to in CODES:
        assert_same(*quantise_rows(grad.to(device), None, to), *quantise_gradient_rows(grad, torch.ones(2), to))
    for part in (grad[:3], grad):
        ones = torch.ones(part.shape[0], 1)
        assert_same(*quantise_blocks(part.to(device), ones.to(device)), *quantise_gradient_blocks(part, ones))


@pytest.mark.parametrize("to", CODES)
def test_strided_gradients(device: torch.device, to: torch.dtype) -> None:
    whole, vector = torch.randn(10, 18), torch.randn(7)
    for grad in (whole[:, 2:9], whole[::2, :7], whole[:, ::2], whole[:7, :5].t(), vector.expand(6, 7)):
        m, n = grad.shape
        row_scale, scale_x = torch.rand(2 * n)[::2], torch.rand(m, 2)[:, 1:]
        on_device = grad.to(device) if device.type == "cpu" else grad
        if device.type != "cpu":  # .to() would make it contiguous
            storage = (vector if grad.stride(0) == 0 else whole).to(device)
            on_device = storage.as_strided(grad.shape, grad.stride(), grad.storage_offset())
        assert_same(*quantise_rows(on_device, row_scale.to(device), to), *quantise_gradient_rows(grad, row_scale, to))
        assert_same(*quantise_blocks(on_device, scale_x.to(device)), *quantise_gradient_blocks(grad, scale_x))


def test_no_tokens(device: torch.device) -> None:
    grad = torch.empty(0, 6, device=device)
    for to in CODES:
        codes, scale = quantise_rows(grad, torch.ones(6, device=device), to)
        assert (codes.shape, codes.dtype, scale.shape) == ((0, 6), to, (0, 1))
    codes, scale = quantise_blocks(grad, torch.empty(0, 1, device=device))
    assert (codes.shape, scale.shape) == ((0, 6), (0, 6))


def test_another_type_of_code_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="int16"):
        quantise_rows(torch.ones(1, 1, device=device), None, torch.int16)
