"""The public op under every backend: the forward is the product of integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes
from bitnet_train.kernels.config import BACKEND_NAMES
from bitnet_train.kernels.op import bit_linear, compute_dtype
from bitnet_train.nn.bit_linear import shared_input_forward
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import TokenCodes, quantise_tokens, rms_norm
from bitnet_train.quant.spec import InputQuant, LayerQuant
from bitnet_train.quant.weights import Codes, quantise_weight
from tests.operands import EPS, ODD_SHAPES, random_input


def oracle(x: Tensor, codes: Codes, backend: Backend, norm: Tensor | None = None) -> Tensor:
    """``(codes_x @ codes_w.T) * scale_x * scale_w`` with the product in 64-bit integers, float32 (M, N)."""
    # Norms add up in an order of their own, so a normed input is given as the backend's quantiser codes it.
    tokens = quantise_tokens(x) if norm is None else backend.quantise(x, None, norm, EPS).codes
    product = tokens.codes.long() @ codes.codes.long().t()
    return product.float() * tokens.scale * codes.row_scale()


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (7, 128), (33, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_the_input_quantiser(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, delta_dtype: torch.dtype | None, normed: bool
) -> None:
    x = random_input(*shape, dtype=dtype)
    delta = None if delta_dtype is None else torch.randn(shape).to(delta_dtype)
    norm = torch.rand(shape[1]) + 0.5 if normed else None
    got = backend.quantise(x, delta, norm, EPS)
    wanted = BACKENDS["reference"].quantise(x, delta, norm, EPS)
    assert torch.equal(got.stream, wanted.stream)
    assert got.stream.dtype is dtype
    assert (got.stream is x) is (delta is None)
    if norm is None:
        assert got.rstd is None
        assert torch.equal(got.codes.codes, wanted.codes.codes)
        assert torch.equal(got.codes.scale, wanted.codes.scale)
        return
    assert got.rstd is not None
    assert wanted.rstd is not None
    assert torch.allclose(got.rstd, wanted.rstd, rtol=1e-6, atol=0)
    assert torch.allclose(got.codes.scale, wanted.codes.scale, rtol=1e-6, atol=0)
    other = (got.codes.codes.int() - wanted.codes.codes.int()).abs()
    assert other.max() <= 1
    assert other.float().mean() < 0.001


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_integer_product_bit_for_bit(
    backend: Backend, shape: tuple[int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    m, k, n = shape
    x, weight = random_input(m, k, dtype=dtype), torch.randn(n, k)
    norm = torch.rand(k) + 0.5 if normed else None
    for layer in (LayerQuant(), LayerQuant("binary", groups="row")):
        codes = quantise_weight(weight, layer)
        for out_dtype in (torch.float32, torch.bfloat16):
            y = bit_linear(x, codes.codes, codes.row_scale(), weight, norm_weight=norm, norm_eps=EPS,
                           out_dtype=out_dtype, backend=backend)  # fmt: skip
            assert y.dtype is out_dtype
            assert torch.equal(y, oracle(x, codes, backend, norm).to(out_dtype))


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 1, 5), (0,), (3, 0)])
def test_any_number_of_leading_dimensions(backend: Backend, leading: tuple[int, ...]) -> None:
    x, weight = torch.randn(*leading, 12, requires_grad=True), torch.randn(7, 12, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())
    for bits in (8, None):
        y = bit_linear(x, codes.codes, codes.row_scale(), weight, inputs=InputQuant(bits), backend=backend)
        assert y.shape == (*leading, 7)
        flat = bit_linear(
            x.reshape(-1, 12), codes.codes, codes.row_scale(), weight, inputs=InputQuant(bits), backend=backend
        )
        assert torch.equal(y.reshape(-1, 7), flat)
        grad_x, grad_w = torch.autograd.grad(y.sum(), (x, weight))
        assert grad_x.shape == x.shape
        assert grad_w.shape == weight.shape


def test_strides_of_input_gradient_and_codes_do_not_matter(backend: Backend) -> None:
    weight = torch.randn(10, 12)
    codes = quantise_weight(weight, LayerQuant())
    base, grad_base = torch.randn(12, 6, 4), torch.randn(10, 4, 6)
    results = []
    for dense in (False, True):
        x, grad = base.permute(2, 1, 0), grad_base.permute(1, 2, 0)
        w_codes = codes.codes.t().contiguous().t()
        if dense:
            x, grad, w_codes = x.contiguous(), grad.contiguous(), w_codes.contiguous()
        x = x.detach().requires_grad_()
        w = weight.clone().requires_grad_()
        assert x.is_contiguous() is dense
        y = bit_linear(x, w_codes, codes.row_scale(), w, backend=backend)
        results.append((y, *torch.autograd.grad(y, (x, w), grad)))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.allclose(strided, contiguous, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])
    expanded = torch.randn(3).requires_grad_()
    y = bit_linear(expanded[:, None].expand(3, 12), codes.codes, codes.row_scale(), weight, backend=backend)
    y.sum().backward()  # the gradient of a sum is an expanded, stride-0 tensor
    assert expanded.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_a_bad_token_gives_a_nan_row_and_leaves_the_others(
    backend: Backend, bad: float, normed: bool, out_dtype: torch.dtype
) -> None:
    x, weight = torch.randn(6, 35), torch.randn(9, 35)
    norm = torch.rand(35) + 0.5 if normed else None
    codes = quantise_weight(weight, LayerQuant())
    settings = {"norm_weight": norm, "norm_eps": EPS, "out_dtype": out_dtype, "backend": backend}
    clean = bit_linear(x, codes.codes, codes.row_scale(), weight, **settings)  # type: ignore[arg-type]
    x[2, 0], x[4, 34] = bad, bad
    y = bit_linear(x, codes.codes, codes.row_scale(), weight, **settings)  # type: ignore[arg-type]
    assert bool(y[[2, 4]].isnan().all())
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


def test_bad_weights_give_bad_outputs(backend: Backend) -> None:
    weight = torch.randn(8, 16)
    weight[5, 3] = float("nan")
    codes = quantise_weight(weight, LayerQuant(groups=4))
    y = bit_linear(torch.randn(3, 16), codes.codes, codes.row_scale(), weight, backend=backend)
    assert bool(y[:, 4:6].isnan().all())
    assert bool(torch.isfinite(y[:, [0, 1, 2, 3, 6, 7]]).all())


@pytest.mark.parametrize("normed", [False, True])
def test_zero_tokens_give_zeros_and_finite_gradients(backend: Backend, normed: bool) -> None:
    x, weight = torch.zeros(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    norm = torch.ones(8, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())
    y = bit_linear(x, codes.codes, codes.row_scale(), weight, norm_weight=norm if normed else None, norm_eps=EPS,
                   backend=backend)  # fmt: skip
    assert torch.equal(y, torch.zeros(3, 4))
    y.sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert int(x.grad.abs().sum() > 0) == 1  # nothing is masked


def test_small_tokens_are_not_shrunk(backend: Backend) -> None:
    weight = torch.ones(2, 4)
    codes = quantise_weight(weight, LayerQuant())
    for size in (1e-3, 1e-4, 1e-5):
        y = bit_linear(torch.full((1, 4), size), codes.codes, codes.row_scale(), weight, backend=backend)
        assert torch.allclose(y, torch.full((1, 2), 4 * size), rtol=1e-5, atol=0)


def test_autocast_does_not_round_the_integers(backend: Backend) -> None:
    # 127 * 501 needs 16 bits, bf16 has 8.
    codes = torch.ones(3, 501, dtype=torch.int8)
    x = torch.full((2, 501), 127.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit_linear(x, codes, torch.ones(3), None, out_dtype=torch.float32, backend=backend)
        assert bit_linear(x, codes, torch.ones(3), None, backend=backend).dtype is torch.bfloat16
        rounded = bit_linear(x, codes, torch.ones(3), None, backend=backend)
    assert torch.equal(y, torch.full((2, 3), 127.0 * 501))
    assert torch.equal(rounded, y.bfloat16())


def test_norm_and_quantiser_are_one_float32_operation(backend: Backend) -> None:
    # Rounding the norm's result to bf16 in between changes 5-6 % of the codes.
    x, norm = torch.randn(64, 128).bfloat16(), torch.rand(128) + 0.5
    identity = torch.eye(128, dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit_linear(x, identity, torch.ones(128), None, norm_weight=norm, norm_eps=EPS, out_dtype=torch.float32,
                       backend=backend)  # fmt: skip
    wanted = quantise_tokens(rms_norm(x, norm, EPS)[0])
    codes = torch.round(y / wanted.scale).to(torch.int8)
    assert (codes != wanted.codes).float().mean() < 0.0005
    between = quantise_tokens(rms_norm(x, norm, EPS)[0].bfloat16()).codes
    assert (between != codes).float().mean() > 0.01  # so the test can tell


def test_the_widest_exact_product_is_exact_and_wider_ones_are_refused(backend: Backend) -> None:
    k = 131071
    codes = torch.ones(2, k, dtype=torch.int8)
    codes[1, ::2] = -1
    x = torch.full((2, k), -3.0)
    y = bit_linear(x * 0 + 127.0, codes, torch.ones(2), None, backend=backend)
    assert y.tolist() == [[127.0 * k, -127.0]] * 2
    lowest = TokenCodes(torch.full((1, k), -128, dtype=torch.int8), torch.ones(1, 1))
    assert backend.matmul(lowest, WeightCodes(codes[:1], torch.ones(1)), None, torch.float32).item() == -128 * k
    with pytest.raises(ValueError, match="131,071"):
        bit_linear(torch.ones(2, k + 1), torch.ones(2, k + 1, dtype=torch.int8), torch.ones(2), None, backend=backend)


def test_the_masters_are_not_read(backend: Backend) -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    codes = quantise_weight(weight, LayerQuant())
    y = bit_linear(x, codes.codes, codes.row_scale(), weight, backend=backend)
    other = bit_linear(x, codes.codes, codes.row_scale(), torch.full_like(weight, float("nan")), backend=backend)
    assert torch.equal(y, other)
    assert torch.equal(y, bit_linear(x, codes.codes, codes.row_scale(), None, backend=backend))


def test_without_gradients_nothing_is_kept(backend: Backend) -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())
    with torch.no_grad():
        y = bit_linear(x, codes.codes, codes.row_scale(), weight, backend=backend)
    assert y.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(bit_linear(x, codes.codes, codes.row_scale(), weight, backend=backend), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer", [LayerQuant(activation_bits=None), LayerQuant("binary", groups=3, activation_bits=None)]
)
def test_float_inputs_meet_the_dequantised_weights(backend: Backend, dtype: torch.dtype, layer: LayerQuant) -> None:
    x, weight = random_input(10, 33, dtype=dtype), torch.randn(6, 33)
    codes = quantise_weight(weight, layer)
    y = bit_linear(x, codes.codes, codes.row_scale(), weight, inputs=InputQuant(None), backend=backend)
    expected = F.linear(x.float(), codes.dequantise())
    assert y.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    assert bool(((y.float() - expected).abs() <= tolerance * x.float().abs().sum(-1, keepdim=True)).all())


def test_the_result_type_is_autocasts_or_the_inputs() -> None:
    x = torch.randn(2, 4)
    assert compute_dtype(x) is torch.float32
    assert compute_dtype(x.half()) is torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) is torch.bfloat16


def test_the_float_counterpart_is_linear_after_norm() -> None:
    x, layer, norm = torch.randn(3, 8), nn.Linear(8, 5), RMSNorm(8, EPS)
    norm.weight.data.uniform_(0.5, 1.5)
    assert torch.equal(shared_input_forward(x, None, [layer], None)[0][0], layer(x))
    expected = layer(F.rms_norm(x, (8,), norm.weight, EPS))
    assert torch.allclose(shared_input_forward(x, None, [layer], norm)[0][0], expected, rtol=1e-5, atol=1e-5)


def test_the_names_known_to_the_configuration_are_the_registered_backends() -> None:
    assert tuple(BACKENDS) == BACKEND_NAMES


def test_the_bias_is_added_before_rounding_and_learns(backend: Backend) -> None:
    x, weight, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())
    for bits in (8, None):
        y = bit_linear(x, codes.codes, codes.row_scale(), None, bias=bias, inputs=InputQuant(bits),
                       out_dtype=torch.bfloat16, backend=backend)  # fmt: skip
        bare = bit_linear(x, codes.codes, codes.row_scale(), None, inputs=InputQuant(bits), out_dtype=torch.float32,
                          backend=backend)  # fmt: skip
        if bits == 8:
            assert torch.equal(y, (bare + bias).bfloat16())
        (grad,) = torch.autograd.grad(y.float().sum(), bias)
        assert torch.equal(grad, torch.full((5,), 6.0))
