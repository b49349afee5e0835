"""The Hadamard rotation against a dense matrix, its inverse and its gradient."""

import pytest
import torch
from torch import Tensor

from bitnet_train.quant.hadamard import hadamard_block, hadamard_matrix, rotate

WIDTHS = [1, 3, 12, 96, 768, 2560, 6912, 8192]
BLOCKS = dict(zip(WIDTHS, [1, 1, 4, 32, 256, 512, 256, 8192], strict=True))
CPU = torch.device("cpu")


def dense(width: int) -> Tensor:
    """The whole block-diagonal matrix, float64, entry by entry: (-1)^popcount(i & j) / sqrt(block)."""
    block = BLOCKS[width]
    index = torch.arange(block, dtype=torch.int16)  # 8192 fit, and a quarter of the memory
    meet, parity = index[:, None] & index[None, :], torch.zeros(block, block, dtype=torch.int16)
    while bool(meet.any()):
        parity, meet = parity ^ (meet & 1), meet >> 1
    return torch.block_diag(*[(1 - 2 * parity).double() / block**0.5] * (width // block))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_the_product_with_the_dense_matrix(width: int) -> None:
    assert hadamard_block(width) == BLOCKS[width]
    x = torch.randn(2, 3, width)
    got = rotate(x)
    assert got.dtype is torch.float32
    assert torch.allclose(got.double(), x.double() @ dense(width), rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthonormal_and_its_own_inverse(width: int) -> None:
    x = torch.randn(3, width)
    there = rotate(x)
    assert torch.allclose(rotate(there), x, rtol=0, atol=1e-5)
    assert torch.allclose(there.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(there @ there.t(), x @ x.t(), rtol=1e-4, atol=1e-3 * width**0.5)


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_the_matrix_is_sylvesters(size: int) -> None:
    matrix = hadamard_matrix(size, CPU)
    assert torch.equal(matrix, matrix.t())
    plus = torch.ones(1, 1)
    while len(plus) < size:
        plus = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), plus)
    assert torch.allclose(matrix * size**0.5, plus)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_gradient_is_rotated_back(width: int) -> None:
    x, grad = torch.randn(2, width, requires_grad=True), torch.randn(2, width)
    (got,) = torch.autograd.grad(rotate(x), x, grad)
    assert torch.allclose(got, rotate(grad), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [3, 12, 256])
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_the_gradient_is_that_of_differences(width: int) -> None:
    # The rotation computes in float32 whatever it is given, so the steps are large; it is linear.
    x = torch.randn(1, width, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, x, eps=0.5, atol=1e-3, rtol=1e-3)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(1, 96)
    x[0, 40] = 32.0
    got = rotate(x)[0]
    assert torch.allclose(got[32:64].abs(), torch.full((32,), 32**0.5))
    assert not bool(got[:32].any() or got[64:].any())


def test_autocast_does_not_round_it() -> None:
    x = torch.randn(4, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x), rotate(x).float())
        assert torch.equal(rotate(x.bfloat16()), rotate(x.bfloat16().float()))
        under = rotate(x)
    assert torch.equal(under, rotate(x))


def test_a_width_first_met_in_inference_mode_can_be_trained_with() -> None:
    size = 64 * 5  # blocks of 64, which no other test of this file uses with gradients
    with torch.inference_mode():
        rotate(torch.randn(2, size))
    x = torch.randn(2, size, requires_grad=True)
    rotate(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())


def test_compiled_it_is_one_graph_and_the_same() -> None:
    x = torch.randn(3, 512, requires_grad=True)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), rotate(x), rtol=0, atol=1e-6)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.allclose(got, 2 * x.detach(), rtol=0, atol=1e-5)


def test_a_block_that_is_too_long_is_refused() -> None:
    rotate(torch.randn(1, 2**14))
    with pytest.raises(ValueError, match="32768 channels"):
        rotate(torch.randn(1, 2**15))
