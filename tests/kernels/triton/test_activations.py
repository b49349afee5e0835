"""Triton's residual add, norm and activation quantiser against the oracle, bit for bit, and the norm's backward."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.triton import activations
from bitnet_train.kernels.triton.activations import norm_backward, quantise, row_tile
from bitnet_train.quant.activations import quantise_tokens, rms_norm

EPS = 1e-5
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# The last two are wider than a row held in registers, of the backward and of the quantiser.
SHAPES = [(1, 1), (3, 1), (1, 5), (9, 31), (33, 130), (5, 257), (3, 2560), (2, 8193), (2, 16385)]


def random_tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, as activations have; in every other one the last element is the largest."""
    x = torch.randn(*shape) * torch.logspace(-2, 2, shape[0])[:, None]
    x[::2, -1] = 5 * x[::2].abs().amax(1)
    return x.to(dtype)


def assert_codes(codes: Tensor, scale: Tensor, value: Tensor) -> None:
    """``codes`` and ``scale`` are those of the float32 tokens ``value`` (on the CPU), bit for bit where finite."""
    expected = quantise_tokens(value)
    assert codes.dtype is torch.int8
    assert scale.dtype is torch.float32
    assert scale.shape == (value.shape[0], 1)
    finite = expected.scale.isfinite().flatten()
    assert torch.equal(scale.cpu()[finite], expected.scale[finite])
    assert torch.equal(codes.cpu()[finite], expected.codes[finite])
    assert bool(scale.cpu()[~finite].isnan().all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_without_norm_are_the_oracles(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = random_tokens(*shape, dtype=dtype)
    codes, scale, stream, rstd = quantise(x.to(device), None, None, 0.0)
    assert_codes(codes, scale, x.float())
    assert stream is None
    assert rstd is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_of_token_divides_alike(device: torch.device, dtype: torch.dtype) -> None:
    # 127 / m is two roundings in PyTorch, m / 127 is one: 2^14 magnitudes tell.
    x = torch.randn(2**14, 32) * torch.exp2(torch.rand(2**14, 1) * 200 - 100)
    codes, scale, _, _ = quantise(x.to(device, dtype), None, None, 0.0)
    assert_codes(codes, scale, x.to(dtype).float())


def test_halves_round_to_even(device: torch.device) -> None:
    x = torch.cat([torch.arange(-253, 254).float() / 2, torch.tensor([127.0])])[None]
    codes, scale, _, _ = quantise(x.to(device), None, None, 0.0)
    assert_codes(codes, scale, x)
    assert codes.cpu()[0, :254].tolist() == [round(i / 2) for i in range(-253, 1)]  # Python's rounding is half-even


def test_small_and_zero_tokens_meet_the_floor(device: torch.device) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-5, -3e-6], [9e-6, 1e-6], [1e-38, 1e-45], [-0.0, 1e-7], [3e38, -3.4e38]])
    codes, scale, _, _ = quantise(x.to(device), None, None, 0.0)
    assert_codes(codes, scale, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [7, 16390])
@pytest.mark.parametrize("normed", [False, True])
def test_a_bad_token_has_a_nan_scale_and_leaves_the_others(
    device: torch.device, bad: float, width: int, normed: bool
) -> None:
    x = torch.randn(4, width)
    x[1, 0], x[3, width - 1] = bad, bad
    weight = torch.rand(width) + 0.5 if normed else None
    _, scale, _, _ = quantise(x.to(device), None, None if weight is None else weight.to(device), EPS)
    assert scale.flatten().isnan().tolist() == [False, True, False, True]
    clean, clean_scale, _, _ = quantise(x[::2].to(device), None, None if weight is None else weight.to(device), EPS)
    codes, scale, _, _ = quantise(x.to(device), None, None if weight is None else weight.to(device), EPS)
    assert torch.equal(codes[::2], clean)
    assert torch.equal(scale[::2], clean_scale)


@pytest.mark.parametrize("types", [(x, d) for x in FLOATS for d in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_residual_and_norm(
    device: torch.device, shape: tuple[int, int], types: tuple[torch.dtype, torch.dtype], normed: bool
) -> None:
    x, delta = random_tokens(*shape, dtype=types[0]), random_tokens(*shape, dtype=types[1])
    weight = (torch.rand(shape[1]) + 0.5).to(types[1]) if normed else None
    codes, scale, stream, rstd = quantise(
        x.to(device), delta.to(device), None if weight is None else weight.to(device), EPS
    )
    expected = (x.float() + delta.float()).to(x.dtype)
    assert stream is not None
    assert stream.dtype is x.dtype
    assert torch.equal(stream.cpu(), expected)
    value = expected.float()
    if weight is not None:
        assert rstd is not None
        assert rstd.shape == (shape[0], 1)
        # PyTorch adds the squares up in another order, which is all that may differ.
        assert torch.allclose(rstd.cpu(), rms_norm(expected, weight, EPS)[1], rtol=1e-6, atol=0)
        value = value * rstd.cpu() * weight.float()
    assert_codes(codes, scale, value)


def test_the_norm_alone(device: torch.device) -> None:
    x, weight = random_tokens(40, 96), torch.rand(96) + 0.5
    codes, scale, stream, rstd = quantise(x.to(device), None, weight.to(device), EPS)
    assert stream is None
    assert rstd is not None
    assert_codes(codes, scale, x * rstd.cpu() * weight)
    wanted = quantise_tokens(rms_norm(x, weight, EPS)[0])
    assert (codes.cpu() != wanted.codes).float().mean() < 1e-3


def test_a_norm_that_overflows_is_the_oracles(device: torch.device) -> None:
    x, weight = torch.tensor([[1e30, 2.0, -1e20]]), torch.ones(3)
    codes, scale, _, rstd = quantise(x.to(device), None, weight.to(device), EPS)
    assert rstd is not None
    assert rstd.item() == 0.0
    assert_codes(codes, scale, rms_norm(x, weight, EPS)[0])


@pytest.mark.parametrize("width", [20, 16390])
def test_strided_inputs(device: torch.device, width: int) -> None:
    weight = torch.rand(2 * width, device=device)[::2]
    whole, delta = torch.randn(5, 2 * width, device=device), torch.randn(width, 5, device=device).t()
    row = torch.randn(width, device=device)
    for x in (whole[:, 1 : width + 1], whole[:, ::2], row.expand(5, width), whole[::2, :width]):
        d = delta[: x.shape[0]]
        for strided, contiguous in zip(
            quantise(x, d, weight, EPS), quantise(x.contiguous(), d.contiguous(), weight.contiguous(), EPS), strict=True
        ):
            assert strided is not None
            assert contiguous is not None
            assert torch.equal(strided, contiguous)


def test_a_residual_of_another_shape_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"delta \(1, 8\)"):
        quantise(torch.ones(3, 8, device=device), torch.ones(1, 8, device=device), None, EPS)


def test_no_tokens(device: torch.device) -> None:
    x = torch.empty(0, 12, device=device)
    codes, scale, stream, rstd = quantise(x, x, torch.ones(12, device=device), EPS)
    assert stream is not None
    assert rstd is not None
    assert [tuple(t.shape) for t in (codes, scale, stream, rstd)] == [(0, 12), (0, 1), (0, 12), (0, 1)]
    grad_x, grad_weight = norm_backward(x, x, torch.ones(12, device=device), rstd, x)
    assert grad_x.shape == (0, 12)
    assert torch.equal(grad_weight, torch.zeros(12, device=device))


def test_short_rows_share_a_program() -> None:
    assert row_tile(1) == (2048, 1, 4)
    assert row_tile(100) == (16, 128, 4)
    assert row_tile(2560) == (1, 4096, 8)
    assert row_tile(16384) == (1, 16384, 16)
    assert row_tile(16385)[0] == 1


def exact_norm_backward(
    grad: Tensor, stream: Tensor, weight: Tensor, grad_stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By autograd in float64."""
    x, w = stream.double().requires_grad_(), weight.double().requires_grad_()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w
    grad_x, grad_weight = torch.autograd.grad(y, (x, w), grad.double())
    return grad_x if grad_stream is None else grad_x + grad_stream.double(), grad_weight


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (1030, 3)])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_backward(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, residual: bool) -> None:
    grad, stream = torch.randn(*shape).to(dtype), random_tokens(*shape, dtype=dtype)
    weight, grad_stream = torch.rand(shape[1]) + 0.5, torch.randn(*shape).to(dtype) if residual else None
    rstd = rms_norm(stream, None, EPS)[1]
    on_device = [t.to(device) for t in (grad, stream, weight, rstd)]
    to_stream = None if grad_stream is None else grad_stream.to(device)
    grad_x, grad_weight = norm_backward(*on_device, to_stream)
    exact_x, exact_weight = exact_norm_backward(grad, stream, weight, grad_stream)
    assert grad_x.dtype is dtype
    assert grad_weight.dtype is torch.float32
    # What float32 loses before it cancels: the terms are about rstd * |grad|.
    terms = (rstd * grad.float().abs().amax(1, keepdim=True)).double() * 1e-5 * shape[1] ** 0.25
    assert bool(((grad_x.cpu().double() - exact_x).abs() <= torch.finfo(dtype).eps / 2 * exact_x.abs() + terms).all())
    assert torch.allclose(grad_weight.cpu().double(), exact_weight, rtol=1e-5, atol=1e-5 * shape[0] ** 0.5)
    again = norm_backward(*on_device, to_stream)
    assert torch.equal(again[0], grad_x)
    assert torch.equal(again[1], grad_weight)


def test_chunks_of_several_tiles_share_no_row(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    grad, stream, weight = torch.randn(70, 300), random_tokens(70, 300), torch.rand(300) + 0.5
    on_device = [t.to(device) for t in (grad, stream, weight, rms_norm(stream, None, EPS)[1])]
    expected = norm_backward(*on_device, None)
    monkeypatch.setattr(activations, "ROW_CHUNKS", 4)  # 18 rows each, in tiles of 4
    grad_x, grad_weight = norm_backward(*on_device, None)
    assert torch.equal(grad_x, expected[0])
    assert torch.allclose(grad_weight, expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [20, 8200])
def test_norm_backward_of_strided_tensors(device: torch.device, width: int) -> None:
    whole = torch.randn(9, 2 * width, device=device)
    grad, stream, grad_stream = whole[:, ::2], whole[:, 3 : width + 3], torch.randn(width, device=device).expand(9, -1)
    weight = torch.rand(width, device=device)
    rstd = rms_norm(stream, None, EPS)[1]
    for strided, contiguous in zip(
        norm_backward(grad, stream, weight, rstd, grad_stream),
        norm_backward(grad.contiguous(), stream.contiguous(), weight, rstd, grad_stream.contiguous()),
        strict=True,
    ):
        assert torch.equal(strided, contiguous)


def run_compiler(program: str) -> None:
    """Runs ``program`` where Triton compiles, for a GPU that need not be there, instead of interpreting."""
    start = """
import dataclasses, triton
from triton.backends.compiler import GPUTarget
from bitnet_train.kernels.triton import activations, gradients, weights
def ptx(wanted):
    return triton.compile(wanted.source(), target=GPUTarget("cuda", 90, 32), options=wanted.options()).asm["ptx"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", start + program], env=environment, check=True, timeout=120)


def test_casts_on_the_gpu_round_to_nearest_as_the_repaired_interpreter_does() -> None:
    run_compiler("""
to_bf16 = [s for s in activations.SPECIALISATIONS if s.signature.get("grad_x") == "*bf16:16"][0]
to_fp8 = [s for s in gradients.SPECIALISATIONS if s.signature["codes"] == "*fp8e4nv:16"][0]
assert "cvt.rn.bf16x2.f32" in ptx(to_bf16)
assert "cvt.rn.satfinite.e4m3x2.f32" in ptx(to_fp8)
""")


def test_kernels_compile_for_sizes_of_one() -> None:
    # Triton turns an argument of 1 into a constant, which not every expression takes.
    run_compiler("""
kernels = {s.kernel.__name__: s for module in (activations, gradients, weights) for s in module.SPECIALISATIONS}
assert len(kernels) == 11, list(kernels)
for s in kernels.values():
    sizes = {name: 1 for name, type_ in s.signature.items() if type_.startswith("i32")}
    others = {name: type_ for name, type_ in s.signature.items() if name not in sizes}
    ptx(dataclasses.replace(s, signature=others, constants=s.constants | sizes))
""")
