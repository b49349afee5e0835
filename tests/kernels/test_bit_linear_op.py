"""The public op under every backend: integers in the forward, the straight-through formula in the backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes
from bitnet_train.kernels.config import BACKEND_NAMES
from bitnet_train.kernels.op import bit_linear, compute_dtype, shared_bit_linear
from bitnet_train.nn.bit_linear import shared_input_forward
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import TokenCodes, quantise_tokens, rms_norm
from bitnet_train.quant.spec import GradientPolicy, LayerQuant
from bitnet_train.quant.weights import Codes, quantise_weight

CPU = torch.device("cpu")
NAMES = [name for name, backend in BACKENDS.items() if backend.unsupported(CPU) is None]
SHAPES = [
    (1, 1, 1),
    (1, 3, 17),
    (3, 17, 1),
    (17, 1, 3),
    (3, 3, 3),
    (7, 13, 19),
    (32, 64, 48),
    (5, 257, 31),
    (33, 130, 127),
]
EPS = 1e-5


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, as activations have."""
    x = torch.randn(*shape)
    return (x * torch.logspace(-2, 2, x[..., 0].numel()).reshape(*shape[:-1], 1)).to(dtype)


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


def through(value: Tensor, quantised: Tensor) -> Tensor:
    """Straight-through: the value of ``quantised``, the gradient of ``value``."""
    return value + (quantised.to(value.dtype) - value).detach()


def textbook(x: Tensor, weight: Tensor, layer: LayerQuant, norm: Tensor | None) -> Tensor:
    """Fake-quantised linear layer as papers write it, in the type of the arguments; autograd does the backward."""
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * norm
    if layer.activation_bits:
        x = through(x, quantise_tokens(x.detach()).dequantise())
    return F.linear(x, through(weight, quantise_weight(weight.float(), layer).dequantise()))


@pytest.mark.parametrize("shape", SHAPES)
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "layer", [LayerQuant(), LayerQuant("binary"), LayerQuant(groups="row"), LayerQuant(activation_bits=None)]
)
def test_gradients_are_autograds_through_the_textbook_formula(
    backend: Backend, shape: tuple[int, int, int], normed: bool, layer: LayerQuant
) -> None:
    m, k, n = shape
    inputs = [random_input(m, k), torch.randn(n, k) * 0.3] + ([torch.rand(k) + 0.5] if normed else [])
    mine = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.double().requires_grad_() for t in inputs]
    grad = torch.randn(m, n)
    codes = quantise_weight(mine[1], layer)
    y = bit_linear(mine[0], codes.codes, codes.row_scale(), mine[1], norm_weight=mine[2] if normed else None,
                   norm_eps=EPS, activation_bits=layer.activation_bits, backend=backend)  # fmt: skip
    expected = textbook(theirs[0], theirs[1], layer, theirs[2] if normed else None)
    if not normed:  # a norm in float64 may round to another code
        assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    y.backward(grad)
    expected.backward(grad.double())
    for got, wanted in zip(mine, theirs, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        assert got.grad.dtype is got.dtype
        # a code that the float64 norm rounds the other way moves one term of dW by one step
        slack = 2e-3 if normed and got is mine[1] else 2e-5
        row_size = wanted.grad.abs().amax(-1, keepdim=True)
        if normed and got is mine[0]:  # the norm's backward takes a difference of terms of this size
            row_size = row_size + k**0.5 / inputs[0].norm(dim=-1, keepdim=True)
        assert bool(((got.grad.double() - wanted.grad).abs() <= slack * row_size + 1e-9).all())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bits", [8, None])
def test_bf16_gradients_are_within_bf16_rounding(backend: Backend, normed: bool, bits: int | None) -> None:
    layer = LayerQuant(activation_bits=bits)
    inputs = [random_input(40, 96), torch.randn(64, 96) * 0.3] + ([torch.rand(96) + 0.5] if normed else [])
    mine = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.double().requires_grad_() for t in inputs]
    codes = quantise_weight(mine[1], layer)
    grad = torch.randn(40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = bit_linear(mine[0], codes.codes, codes.row_scale(), mine[1], norm_weight=mine[2] if normed else None,
                       norm_eps=EPS, activation_bits=bits, backend=backend,
                       gradient=GradientPolicy("bf16", "bf16"))  # fmt: skip
    assert y.dtype is torch.bfloat16
    y.backward(grad.bfloat16())
    textbook(*theirs[:2], layer, theirs[2] if normed else None).backward(grad.double())
    for got, wanted in zip(mine, theirs, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        assert got.grad.dtype is torch.float32
        noise = (got.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert noise < 0.01  # 40 dB; bf16 rounding of both operands is about 50 dB


def test_backends_agree_on_gradients(backend: Backend) -> None:
    x, weight, norm, grad = random_input(33, 70), torch.randn(45, 70), torch.rand(70), torch.randn(33, 45)
    codes = quantise_weight(weight, LayerQuant())
    results = []
    for chosen in (backend, BACKENDS["reference"]):
        leaves = [t.clone().requires_grad_() for t in (x, weight, norm)]
        y = bit_linear(leaves[0], codes.codes, codes.row_scale(), leaves[1], norm_weight=leaves[2], norm_eps=EPS,
                       backend=chosen)  # fmt: skip
        y.backward(grad)
        results.append([leaf.grad for leaf in leaves])
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


def test_row_scales_go_into_the_gradient(backend: Backend) -> None:
    # One layer of 1 and one of 100 times its size, stacked: dX must weigh the second 100 times.
    x = torch.randn(4, 6, requires_grad=True)
    codes = torch.ones(2, 6, dtype=torch.int8)
    for out_row, scale in ((0, 1.0), (1, 100.0)):
        (grad,) = torch.autograd.grad(
            bit_linear(x, codes, torch.tensor([1.0, 100.0]), None, backend=backend)[:, out_row].sum(), x
        )
        assert torch.equal(grad, torch.full((4, 6), scale))


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 1, 5), (0,), (3, 0)])
def test_any_number_of_leading_dimensions(backend: Backend, leading: tuple[int, ...]) -> None:
    x, weight = torch.randn(*leading, 12, requires_grad=True), torch.randn(7, 12, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())
    for bits in (8, None):
        y = bit_linear(x, codes.codes, codes.row_scale(), weight, activation_bits=bits, backend=backend)
        assert y.shape == (*leading, 7)
        flat = bit_linear(
            x.reshape(-1, 12), codes.codes, codes.row_scale(), weight, activation_bits=bits, backend=backend
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


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("learning", ["xwn", "x", "w", "n", "xw", "wn", "xn", ""])
def test_only_what_learns_gets_a_gradient_and_it_is_the_same(backend: Backend, bits: int | None, learning: str) -> None:
    x, weight, norm, grad = torch.randn(5, 12), torch.randn(6, 12), torch.rand(12) + 0.5, torch.randn(5, 6)
    codes = quantise_weight(weight, LayerQuant())

    def run(wanted: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        leaves = {
            name: t.clone().requires_grad_(name in wanted) for name, t in zip("xwn", (x, weight, norm), strict=True)
        }
        y = bit_linear(leaves["x"], codes.codes, codes.row_scale(), leaves["w"], norm_weight=leaves["n"],
                       norm_eps=EPS, activation_bits=bits, backend=backend)  # fmt: skip
        assert y.requires_grad is bool(wanted)
        if wanted:
            y.backward(grad)
        return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    y_all, grads_all = run("xwn")
    y, grads = run(learning)
    assert torch.equal(y, y_all)
    for name in "xwn":
        if name in learning:
            assert torch.allclose(grads[name], grads_all[name])  # type: ignore[arg-type]
        else:
            assert grads[name] is None


def test_stacked_masters_get_their_own_rows_of_the_gradient_in_their_type(backend: Backend) -> None:
    x = torch.randn(9, 12)
    rows, dtypes = (3, 1, 5), (torch.float32, torch.bfloat16, torch.float32)
    masters = [
        torch.randn(r, 12).to(d).requires_grad_(i != 2) for i, (r, d) in enumerate(zip(rows, dtypes, strict=True))
    ]
    quantised = [quantise_weight(m, LayerQuant()) for m in masters]
    stack = WeightCodes(torch.cat([q.codes for q in quantised]), torch.cat([q.row_scale() for q in quantised]))
    outputs, _ = shared_bit_linear(x, None, stack, masters, rows=rows, backend=backend)
    assert [y.shape for y in outputs] == [(9, n) for n in rows]
    assert torch.equal(torch.cat(outputs, 1), bit_linear(x, stack.codes, stack.row_scale, None, backend=backend))
    grad = torch.randn(9, 9)
    torch.autograd.backward(outputs, grad.split(rows, dim=1))
    expected = grad.t() @ quantise_tokens(x).dequantise()
    for master, part in zip(masters, expected.split(rows), strict=True):
        if master.requires_grad:
            assert master.grad is not None
            assert master.grad.dtype is master.dtype
            assert torch.allclose(
                master.grad.float(), part, rtol=1e-2 if master.dtype is torch.bfloat16 else 1e-5, atol=1e-3
            )
    assert masters[2].grad is None


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


def test_the_backward_keeps_int8_codes_and_no_float_copy_of_the_input(backend: Backend) -> None:
    saved: list[Tensor] = []
    x, weight = torch.randn(64, 96, requires_grad=True), torch.randn(32, 96, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bit_linear(x, codes.codes, codes.row_scale(), weight, backend=backend)
    assert saved
    assert all(not t.is_floating_point() or t.numel() <= 64 for t in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer", [LayerQuant(activation_bits=None), LayerQuant("binary", groups=3, activation_bits=None)]
)
def test_float_inputs_meet_the_dequantised_weights(backend: Backend, dtype: torch.dtype, layer: LayerQuant) -> None:
    x, weight = random_input(10, 33, dtype=dtype), torch.randn(6, 33)
    codes = quantise_weight(weight, layer)
    y = bit_linear(x, codes.codes, codes.row_scale(), weight, activation_bits=None, backend=backend)
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


def test_torch_compile_gives_the_same_codes_and_gradients() -> None:
    x, weight, norm = random_input(24, 40), torch.randn(16, 40), torch.rand(40) + 0.5
    codes = quantise_weight(weight, LayerQuant())

    def op(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        return bit_linear(x, codes.codes, codes.row_scale(), weight, norm_weight=norm, norm_eps=EPS)

    results = []
    for function in (op, torch.compile(op, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, norm)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    # One code more or less would move an output by scale_x * scale_w, far above the tolerance.
    step = rms_norm(x, norm, EPS)[0].abs().amax(-1, keepdim=True) / 127 * codes.scale
    assert bool(((results[0][0] - results[1][0]).abs() < 0.01 * step).all())
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5 * eager.abs().max().item())


@pytest.mark.parametrize("policy", [("int8", "bf16"), ("fp8", "bf16"), ("bf16", "int8"), ("int8", "int8")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (129, 70, 45), (300, 130, 127)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gradients_are_the_references(
    backend: Backend, policy: tuple[str, str], shape: tuple[int, int, int], grad_dtype: torch.dtype
) -> None:
    m, k, n = shape
    rows = (n, 1, n)
    x, codes_w = quantise_tokens(random_input(m, k)), torch.randint(-1, 2, (sum(rows), k), dtype=torch.int8)
    weights = WeightCodes(codes_w, torch.rand(sum(rows)))
    grads = [(torch.randn(m, r) * 1e-6).to(grad_dtype) for r in rows]
    grads[0] = grads[0].t().contiguous().t()
    reference, (dx, dw) = BACKENDS["reference"], policy
    for out_dtype in (torch.float32, torch.bfloat16):
        got = backend.grad_input(grads, weights, dx, out_dtype)
        wanted = reference.grad_input(grads, weights, dx, out_dtype)
        assert got.dtype is out_dtype
        if dx == "int8":  # integers: every backend the same, bit for bit
            assert torch.equal(got, wanted)
        else:
            assert torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
    for got, wanted in zip(backend.grad_weight(grads, x, dw), reference.grad_weight(grads, x, dw), strict=True):
        if dw == "int8":
            assert got.dtype is torch.float32
            assert torch.equal(got, wanted)
        else:
            assert torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-2 * wanted.abs().max().item())


@pytest.mark.parametrize("policy", ["bf16", "int8", "fp8"])
def test_a_bad_gradient_shows(backend: Backend, policy: str) -> None:
    grad = torch.randn(140, 6)
    grad[130, 2] = float("nan")
    weights = WeightCodes(torch.randint(-1, 2, (6, 9), dtype=torch.int8), torch.ones(6))
    grad_x = backend.grad_input([grad], weights, policy, torch.float32)
    assert bool(grad_x[130].isnan().any())
    assert bool(torch.isfinite(grad_x[:130]).all())
    if policy != "fp8":
        (grad_w,) = backend.grad_weight([grad], quantise_tokens(torch.randn(140, 9)), policy)
        assert grad_w.isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("bits", [8, None])
def test_the_residual_is_added_and_its_gradient_passes(backend: Backend, bits: int | None) -> None:
    x, delta, norm = torch.randn(5, 12), torch.randn(5, 12).bfloat16(), torch.rand(12) + 0.5
    weight = torch.randn(7, 12)
    codes = quantise_weight(weight, LayerQuant())
    weights = WeightCodes(codes.codes, codes.row_scale())
    grad, grad_stream = torch.randn(5, 7), torch.randn(5, 12)

    def run(fused: bool) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, delta, norm, weight)]
        summed = leaves[0] if fused else leaves[0] + leaves[1].float()
        (y,), stream = shared_bit_linear(
            summed, leaves[1] if fused else None, weights, [leaves[3]], norm_weight=leaves[2], norm_eps=EPS,
            activation_bits=bits, backend=backend, gradient=GradientPolicy("bf16", "bf16"),
        )  # fmt: skip
        return y, stream, *torch.autograd.grad([y, stream], leaves, [grad, grad_stream])

    for got, wanted in zip(run(True), run(False), strict=True):
        assert got.dtype is wanted.dtype
        assert torch.allclose(got, wanted, rtol=1e-2 if got.dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def test_only_the_stream_is_used(backend: Backend) -> None:
    x, delta = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    weights = WeightCodes(torch.ones(2, 4, dtype=torch.int8), torch.ones(2))
    _, stream = shared_bit_linear(x, delta, weights, [None], backend=backend)
    grads = torch.autograd.grad(stream.sum(), (x, delta))
    assert all(torch.equal(grad, torch.ones(3, 4)) for grad in grads)


def test_the_bias_is_added_before_rounding_and_learns(backend: Backend) -> None:
    x, weight, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())
    for bits in (8, None):
        y = bit_linear(x, codes.codes, codes.row_scale(), None, bias=bias, activation_bits=bits,
                       out_dtype=torch.bfloat16, backend=backend)  # fmt: skip
        bare = bit_linear(x, codes.codes, codes.row_scale(), None, activation_bits=bits, out_dtype=torch.float32,
                          backend=backend)  # fmt: skip
        if bits == 8:
            assert torch.equal(y, (bare + bias).bfloat16())
        (grad,) = torch.autograd.grad(y.float().sum(), bias)
        assert torch.equal(grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(backend: Backend, use_reentrant: bool) -> None:
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    codes = quantise_weight(weight, LayerQuant())

    def run(x: Tensor) -> Tensor:
        return bit_linear(x, codes.codes, codes.row_scale(), weight, backend=backend).square()

    wanted = torch.autograd.grad(run(x).sum(), (x, weight))
    run_again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=use_reentrant)
    run_again.sum().backward()
    assert torch.equal(x.grad, wanted[0])  # type: ignore[arg-type]
    assert torch.equal(weight.grad, wanted[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [("bf16", "bf16"), ("int8", "int8")])
def test_compiled_there_is_one_graph_and_the_same_result(backend: Backend, policy: tuple[str, str]) -> None:
    weight = torch.randn(8, 16)
    codes = quantise_weight(weight, LayerQuant())
    weights = WeightCodes(codes.codes, codes.row_scale())

    def run(x: Tensor, delta: Tensor, master: Tensor) -> Tensor:
        outputs, stream = shared_bit_linear(
            x, delta, weights, [master, master[:4]], rows=(4, 4), norm_weight=torch.ones(16), norm_eps=EPS,
            backend=backend, gradient=GradientPolicy(*policy),
        )  # fmt: skip
        return torch.cat([*outputs, stream], 1)

    masters = weight[:4]
    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (torch.ones(5, 16).cumsum(0), torch.ones(5, 16), masters)]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["quantise", "matmul", "grad_input", "grad_weight"])
def test_the_avx512_operators_are_registered_as_torch_compile_wants_them(name: str) -> None:
    if "avx512" not in NAMES:
        pytest.skip("this CPU has no AVX-512 kernels")
    x, norm, scale, row_scale = torch.randn(5, 12), torch.rand(12), torch.rand(5, 1), torch.rand(9)
    codes_x = torch.randint(-127, 128, (5, 12), dtype=torch.int8)
    codes_w = torch.randint(-1, 2, (9, 12), dtype=torch.int8)
    grads = [torch.randn(5, 4), torch.randn(5, 5)]
    arguments = {
        "quantise": (x, x, norm, EPS),
        "matmul": (codes_x, scale, codes_w, row_scale, row_scale, torch.bfloat16),
        "grad_input": (grads, codes_w, row_scale, torch.bfloat16),
        "grad_weight": (grads, codes_x, scale),
    }[name]
    op = getattr(torch.ops.bitnet_train, f"avx512_{name}").default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_input_is_the_gate_before_the_op(
    backend: Backend, activation: str, normed: bool, bits: int | None, dtype: torch.dtype
) -> None:
    up, gate = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 12, dtype=dtype)
    weight, norm = torch.randn(7, 12), torch.rand(12) + 0.5
    codes = quantise_weight(weight, LayerQuant())
    grad = torch.randn(2, 5, 7)
    kept: list[Tensor] = []

    def run(fused: bool) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (up, gate, weight, norm)]
        inner = F.silu(leaves[1]) if activation == "silu" else F.relu(leaves[1]).square()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            (y,), _ = shared_bit_linear(
                leaves[0] if fused else inner * leaves[0], None, WeightCodes(codes.codes, codes.row_scale()),
                [leaves[2]], gate=leaves[1] if fused else None, activation=activation if fused else "",
                norm_weight=leaves[3] if normed else None, norm_eps=EPS, activation_bits=bits, backend=backend,
                out_dtype=torch.float32, gradient=GradientPolicy("auto", "auto"),
            )  # fmt: skip
        learning = leaves if normed else leaves[:3]
        return y, *torch.autograd.grad(y, learning, grad)

    results = run(True)
    if bits == 8:  # gate and up, and no float tensor of that size besides
        assert sum(t.is_floating_point() and t.numel() == up.numel() for t in kept) == 2
    for got, wanted in zip(results, run(False), strict=True):
        assert got.dtype is wanted.dtype
        slack = 2e-2 if dtype is torch.bfloat16 else 1e-4
        assert torch.allclose(got, wanted, rtol=slack, atol=slack)


def test_a_gate_and_a_residual_exclude_each_other() -> None:
    x, weights = torch.randn(2, 4), WeightCodes(torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="no residual"):
        shared_bit_linear(x, x, weights, [None], gate=x, activation="silu")
