"""The public op under every backend: the backward is the straight-through formula, in each precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes
from bitnet_train.kernels.op import bit_linear, shared_bit_linear
from bitnet_train.quant.activations import quantise_tokens
from bitnet_train.quant.spec import GradientPolicy, InputQuant, LayerQuant
from bitnet_train.quant.weights import quantise_weight
from tests.operands import EPS, ODD_SHAPES, random_input


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


@pytest.mark.parametrize("shape", ODD_SHAPES)
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
                   norm_eps=EPS, inputs=layer.inputs, backend=backend)  # fmt: skip
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
                       norm_eps=EPS, inputs=InputQuant(bits), backend=backend,
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
                       norm_eps=EPS, inputs=InputQuant(bits), backend=backend)  # fmt: skip
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


@pytest.mark.parametrize("rows", [(50,), (7, 41, 20)])
def test_int8_weight_gradients_of_many_tokens_are_the_references(backend: Backend, rows: tuple[int, ...]) -> None:
    # So many that a backend goes through the outputs in several groups.
    tokens = 70_001
    x = quantise_tokens(torch.randn(tokens, 5))
    grads = [torch.randn(tokens, r).bfloat16() for r in rows]
    got, wanted = (b.grad_weight(grads, x, "int8") for b in (backend, BACKENDS["reference"]))
    assert [part.shape for part in got] == [(r, 5) for r in rows]
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


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
            inputs=InputQuant(bits), backend=backend, gradient=GradientPolicy("bf16", "bf16"),
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
                norm_weight=leaves[3] if normed else None, norm_eps=EPS, inputs=InputQuant(bits), backend=backend,
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
