"""The matmul kernels against integer products and the reference's scaling, bit for bit where the sum is exact."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.backend import WeightCodes
from bitnet_train.kernels.reference import ReferenceBackend
from bitnet_train.kernels.triton.matmul import bf16_matmul_codes, fp8_matmul, int8_matmul, int8_matmul_packed
from bitnet_train.quant.activations import TokenCodes
from bitnet_train.quant.gradients import quantise_gradient_rows
from bitnet_train.quant.packing import pack_quarters

# Ones, primes, whole tiles and ragged ones (the interpreter's tiles are 16 x 16 x 32), several groups of tiles.
SHAPES = [(1, 1, 1), (3, 17, 1), (1, 3, 33), (17, 1, 5), (16, 32, 16), (33, 64, 48), (31, 67, 37), (150, 40, 18)]
FP8 = torch.float8_e4m3fn


def int8(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def expected_scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    result = (a.long() @ b.long().t()).float() * scale_a
    if scale_b is not None:
        result = result * scale_b
    if bias is not None:
        result = result + bias.float()
    return result.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_integer_product_bit_for_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, way: str, device: torch.device
) -> None:
    m, k, n = shape
    a, b = int8(m, k), int8(n, k, low=-1, high=1)
    scale_a, scale_b, bias = torch.rand(m, 1) * 1e-2, torch.rand(n), torch.randn(n, dtype=torch.bfloat16)
    for s, c in ((scale_b, None), (None, None), (scale_b, bias), (None, bias)):
        y = int8_matmul(*(None if t is None else t.to(device) for t in (a, b, scale_a, s, c)), dtype)  # type: ignore[misc,arg-type]
        assert y.dtype is dtype
        assert torch.equal(y.cpu(), expected_scaled(a, b, scale_a, s, c, dtype))


@pytest.mark.parametrize("shape", [*SHAPES, (20, 68, 21), (7, 130, 9), (18, 256, 20), (5, 3, 4), (5, 260, 17)])
def test_packed_weights_give_the_same_bits(shape: tuple[int, int, int], way: str, device: torch.device) -> None:
    m, k, n = shape
    a, b = int8(m, k).to(device), int8(n, k, low=-1, high=1).to(device)
    scale_a, scale_b, bias = (t.to(device) for t in (torch.rand(m, 1), torch.rand(n), torch.randn(n)))
    for s, c in ((scale_b, bias), (None, None)):
        y = int8_matmul_packed(a, pack_quarters(b), scale_a, s, c, torch.float32)
        assert torch.equal(y, int8_matmul(a, b, scale_a, s, c, torch.float32))


def test_packed_weights_must_fit_the_width(device: torch.device) -> None:
    a, packed = int8(3, 9).to(device), torch.zeros(2, 2, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="2 bytes a row do not hold the 9 weights"):
        int8_matmul_packed(a, packed, torch.ones(3, 1, device=device), None, None, torch.float32)


def test_the_scaling_order_is_the_reference_backends(device: torch.device) -> None:
    a, b = int8(40, 64), int8(24, 64, low=-1, high=1)
    scale_a, scale_b, bias = torch.rand(40, 1), torch.rand(24), torch.randn(24)
    reference = ReferenceBackend().matmul(TokenCodes(a, scale_a), WeightCodes(b, scale_b), bias, torch.bfloat16)
    y = int8_matmul(*(t.to(device) for t in (a, b, scale_a, scale_b, bias)), torch.bfloat16)  # type: ignore[misc,arg-type]
    assert torch.equal(y.cpu(), reference)


def test_the_largest_sums_are_exact_and_wider_ones_are_refused(device: torch.device) -> None:
    k = 131_071 if device.type == "cuda" else 20_011  # the interpreter is slow
    a, b = torch.full((1, k), -128, dtype=torch.int8, device=device), torch.ones(1, k, dtype=torch.int8, device=device)
    one = torch.ones(1, 1, device=device)
    assert int8_matmul(a, b, one, None, None, torch.float32).item() == -128 * k
    assert int8_matmul_packed(a, pack_quarters(b), one, None, None, torch.float32).item() == -128 * k
    wide = torch.empty(1, 131_072, dtype=torch.int8, device=device)
    for refused in (
        lambda: int8_matmul(wide, wide, one, None, None, torch.float32),
        lambda: int8_matmul_packed(wide, wide, one, None, None, torch.float32),
    ):
        with pytest.raises(ValueError, match="131,071"):
            refused()


def test_a_nan_scale_gives_a_nan_row_and_leaves_the_others(device: torch.device) -> None:
    a, b = int8(20, 24).to(device), int8(18, 24, low=-1, high=1).to(device)
    scale = torch.rand(20, 1).to(device)
    clean = int8_matmul(a, b, scale, None, None, torch.bfloat16)
    scale[7] = float("nan")
    for y in (
        int8_matmul(a, b, scale, None, None, torch.bfloat16),
        int8_matmul_packed(a, pack_quarters(b), scale, None, None, torch.bfloat16),
    ):
        assert bool(y[7].isnan().all())
        y[7] = clean[7]
        assert torch.equal(y, clean)
    row_scale = torch.ones(18, device=device)
    row_scale[3] = float("nan")
    column = int8_matmul(a, b, torch.ones(20, 1, device=device), row_scale, None, torch.float32).isnan()
    assert bool(column[:, 3].all())
    assert int(column.sum()) == 20


@pytest.mark.parametrize("kind", ["transposed", "sliced", "offset", "expanded"])
def test_strides_do_not_matter(kind: str, way: str, device: torch.device) -> None:
    m, k, n = 19, 48, 21

    def strided(t: Tensor) -> Tensor:
        rows, columns = t.shape
        if kind == "transposed":
            return t.t().contiguous().t()
        wide = torch.full((rows, columns + 16), 5, device=t.device).to(t.dtype)
        start = {"sliced": 16, "offset": 3, "expanded": 0}[kind]
        wide[:, start : start + columns] = t
        return wide[:, start : start + columns]

    a, b = int8(m, k).to(device), int8(n, k, low=-1, high=1).to(device)
    scale_a, scale_b = torch.rand(m, 1).to(device), torch.rand(n).to(device)
    dy = torch.randn(m, n).to(device)
    if kind == "expanded":
        a, dy = a[:1].expand(m, k), dy[:, :1].expand(m, n)
    codes = int8(n, k, low=-1, high=1).to(device)
    packed = pack_quarters(b)
    loose = (lambda t: t) if kind == "expanded" else strided
    assert torch.equal(
        int8_matmul(loose(a), strided(b), scale_a, scale_b, None, torch.float32),
        int8_matmul(a.contiguous(), b, scale_a, scale_b, None, torch.float32),
    )
    assert torch.equal(
        int8_matmul_packed(loose(a), strided(packed), scale_a, scale_b, None, torch.float32),
        int8_matmul_packed(a.contiguous(), packed, scale_a, scale_b, None, torch.float32),
    )
    assert torch.equal(
        bf16_matmul_codes(loose(dy), scale_b, strided(codes), torch.float32),
        bf16_matmul_codes(dy.contiguous(), scale_b, codes, torch.float32),
    )
    # a scale that is every other element of something
    assert torch.equal(
        int8_matmul(a, b, scale_a.expand(m, 2)[:, 1:], scale_b.repeat_interleave(2)[::2], None, torch.float32),
        int8_matmul(a, b, scale_a, scale_b, None, torch.float32),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_sums_in_float32(shape: tuple[int, int, int], way: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    m, n, k = shape
    grad, codes_t = torch.randn(m, n) * 1e-5, int8(k, n, low=-1, high=1).to(FP8)
    q = quantise_gradient_rows(grad, torch.rand(n), FP8)
    exact = (q.codes.double() @ codes_t.double().t()) * q.scale.double()
    size = (q.codes.double().abs() @ codes_t.double().abs().t()) * q.scale.double()
    y = fp8_matmul(q.codes.to(device), codes_t.to(device), q.scale.to(device), None, torch.float32)
    assert bool(((y.cpu().double() - exact).abs() <= 2e-4 * size + 1e-30).all())
    scale_b = torch.rand(k)
    scaled = fp8_matmul(q.codes.to(device), codes_t.to(device), q.scale.to(device), scale_b.to(device), torch.bfloat16)
    assert torch.allclose(scaled.cpu().double(), exact * scale_b, rtol=1e-2, atol=1e-2 * size.max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float_dx_rounds_once_and_sums_in_float32(
    shape: tuple[int, int, int], dtype: torch.dtype, way: str, device: torch.device
) -> None:
    m, n, k = shape
    dy, row_scale, codes = torch.randn(m, n).to(dtype), torch.rand(n), int8(n, k, low=-1, high=1)
    operand = (dy.float() * row_scale).to(dtype).double()
    exact = operand @ codes.double()
    size = operand.abs() @ codes.double().abs()
    y = bf16_matmul_codes(dy.to(device), row_scale.to(device), codes.to(device), torch.float32)
    assert bool(((y.cpu().double() - exact).abs() <= 1e-6 * size + 1e-30).all())
    if dtype is not torch.float32:
        rounded = bf16_matmul_codes(dy.to(device), row_scale.to(device), codes.to(device), dtype)
        assert rounded.dtype is dtype
        assert torch.equal(rounded, y.to(dtype))


def test_no_tokens_give_an_empty_result(device: torch.device) -> None:
    a, b, scale = (
        torch.empty(0, 8, dtype=torch.int8, device=device),
        int8(5, 8, low=-1, high=1).to(device),
        torch.empty(0, 1, device=device),
    )
    assert int8_matmul(a, b, scale, None, None, torch.bfloat16).shape == (0, 5)
    assert int8_matmul_packed(a, pack_quarters(b), scale, None, None, torch.bfloat16).shape == (0, 5)
    assert fp8_matmul(a.to(FP8), b.to(FP8), scale, None, torch.bfloat16).shape == (0, 5)
    dy = torch.empty(0, 5, device=device)
    assert bf16_matmul_codes(dy, torch.ones(5, device=device), b, torch.float32).shape == (0, 8)
