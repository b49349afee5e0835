"""The op under every backend for inputs and weights that are not BitNet b1.58's own: integers forward, straight-through
gradients backward."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes
from bitnet_train.kernels.op import bit_linear, shared_bit_linear
from bitnet_train.quant.activations import TokenCodes, quantise_inputs, rms_norm
from bitnet_train.quant.hadamard import rotate
from bitnet_train.quant.packing import pack_quarters
from bitnet_train.quant.spec import GradientPolicy, InputQuant, LayerQuant
from bitnet_train.quant.weights import Codes, quantise_weight, statistic_scale
from tests.operands import EPS, random_input

INPUTS = [
    InputQuant(4),
    InputQuant(4, "absmean"),
    InputQuant(2, "absmean"),
    InputQuant(8, "absmean"),
    InputQuant(8, "absmax", "group", 4),
    InputQuant(4, "absmean", "group", 12),
    InputQuant(8, "absmax", "tensor"),
    InputQuant(5, "absmean", "tensor"),
    InputQuant(top_k=0.5),
    InputQuant(hadamard=True),
    InputQuant(4, "absmean", "group", 4, 0.5, True),
]
FLOAT_INPUTS = InputQuant(None)
WEIGHTS = [
    LayerQuant(),
    LayerQuant("binary", group_rows=1),
    LayerQuant("symmetric", bits=4, groups=2),
    LayerQuant("symmetric", bits=8),
]
# Tokens, inputs, outputs: the inputs divide by 12.
SHAPES = [(1, 12, 2), (7, 12, 6), (5, 60, 34), (33, 132, 128)]


def through(value: Tensor, quantised: Tensor) -> Tensor:
    """Straight-through: the value of ``quantised``, the gradient of ``value``."""
    return value + (quantised - value).detach()


def read(x: Tensor, inputs: InputQuant) -> Tensor:
    """The values that the matmul reads, float32."""
    rotated = rotate(x) if inputs.hadamard else x.float()
    return rotated if inputs.bits is None else quantise_inputs(rotated, inputs).dequantise()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("layer", WEIGHTS, ids=lambda layer: f"{layer.scheme}{layer.bits or ''}")
def test_forward_is_the_product_of_dequantised_values(
    backend: Backend, inputs: InputQuant, layer: LayerQuant, shape: tuple[int, int, int]
) -> None:
    m, k, n = shape
    x, weight, bias = random_input(m, k), torch.randn(n, k), torch.randn(n)
    codes = quantise_weight(weight, layer)
    y = bit_linear(x, codes.codes, codes.row_scale(), weight, bias=bias, inputs=inputs, backend=backend,
                   largest_code=layer.largest_code)  # fmt: skip
    values, weights = read(x, inputs).double(), codes.dequantise().double()
    wanted = values @ weights.t() + bias
    slack = 1e-6 * (values.abs() @ weights.abs().t() + bias.abs())
    assert bool(((y.double() - wanted).abs() <= slack).all())
    with torch.no_grad():
        assert torch.equal(
            y, bit_linear(x, codes.codes, codes.row_scale(), None, bias=bias, inputs=inputs, backend=backend,
                          largest_code=layer.largest_code)
        )  # fmt: skip


@pytest.mark.parametrize("inputs", [i for i in INPUTS if i.granularity != "group"], ids=str)
@pytest.mark.parametrize("layer", WEIGHTS, ids=lambda layer: f"{layer.scheme}{layer.bits or ''}")
def test_with_one_scale_per_token_the_product_is_that_of_integers_bit_for_bit(
    backend: Backend, inputs: InputQuant, layer: LayerQuant
) -> None:
    x, codes = random_input(9, 60), quantise_weight(torch.randn(14, 60), layer)
    tokens = quantise_inputs(rotate(x) if inputs.hadamard else x, inputs)
    product = tokens.codes.long() @ codes.codes.long().t()
    y = bit_linear(x, codes.codes, codes.row_scale(), None, inputs=inputs, backend=backend,
                   largest_code=layer.largest_code)  # fmt: skip
    assert torch.equal(y, product.float() * tokens.scale * codes.row_scale())


@pytest.mark.parametrize("fill", ["largest", "random"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_8_bit_products_beyond_float32s_integers_are_exact(backend: Backend, fill: str, out_dtype: torch.dtype) -> None:
    k = 2048  # 127 * 127 * 2048 is about twice 2^24
    if fill == "largest":
        codes_x, codes_w = torch.full((3, k), 127, dtype=torch.int8), torch.full((5, k), 127, dtype=torch.int8)
        codes_x[1, ::2], codes_x[2, 0], codes_w[3, 1], codes_w[4, 0] = 126, 1, -1, 126
    else:
        codes_x = torch.randint(-128, 128, (33, k), dtype=torch.int8)
        codes_w = torch.randint(100, 128, (29, k), dtype=torch.int8)
        codes_x[::3] = codes_x[::3].abs().clamp(min=90)
    scale, row_scale = torch.rand(len(codes_x), 1), torch.rand(len(codes_w))
    product = codes_x.long() @ codes_w.long().t()
    assert int(product.max()) > 2**24
    assert bool((product % 2 == 1).any())
    got = backend.matmul(TokenCodes(codes_x, scale), WeightCodes(codes_w, row_scale, largest=127), None, out_dtype)
    assert torch.equal(got, (product.float() * scale * row_scale).to(out_dtype))


@pytest.mark.parametrize("layer", WEIGHTS[2:], ids=str)
def test_int8_gradients_of_wider_codes_are_the_references(backend: Backend, layer: LayerQuant) -> None:
    n = 2048
    codes = quantise_weight(torch.randn(n, 24), layer)
    weights = WeightCodes(codes.codes, codes.row_scale(), largest=layer.largest_code)
    grads = [torch.randn(7, n // 2), torch.randn(7, n // 2)]
    got, wanted = (b.grad_input(grads, weights, "int8", torch.float32) for b in (backend, BACKENDS["reference"]))
    assert torch.equal(got, wanted)
    exact = torch.cat(grads, 1).double() * codes.row_scale().double() @ codes.codes.double()
    assert (got - exact).norm() < 0.01 * exact.norm()


# --- gradients ---


def learned_values(weight: Tensor, scale: Tensor | None, codes: Codes, largest: int) -> Tensor:
    """Weights as plain PyTorch quantises them: straight through to the weight, LSQ's gradient to the scale."""
    values = through(weight, codes.dequantise())
    if scale is None:
        return values
    ratio = weight.detach().reshape(len(scale), -1) / scale[:, None]
    if codes.codes.abs().min() == 0 or largest > 1:
        rounded = ratio.clamp(-largest, largest)
        rounded = rounded + (codes.codes.reshape(rounded.shape) - rounded).detach()
    else:
        rounded = codes.codes.reshape(ratio.shape) + ratio.clamp(-1, 1) - ratio.clamp(-1, 1).detach()
    by_scale = (rounded * scale[:, None]).reshape(weight.shape)
    return values + by_scale - by_scale.detach()


def close(got: Tensor | None, wanted: Tensor | None, slack: float = 3e-5) -> bool:
    assert got is not None
    assert wanted is not None
    assert got.shape == wanted.shape
    return bool(((got.double() - wanted.double()).abs() <= slack * (wanted.abs().max() + 1e-6)).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", [*INPUTS, FLOAT_INPUTS], ids=str)
@pytest.mark.parametrize("layer", WEIGHTS, ids=lambda layer: f"{layer.scheme}{layer.bits or ''}")
def test_gradients_are_plain_straight_through_ones(
    backend: Backend, inputs: InputQuant, layer: LayerQuant, shape: tuple[int, int, int]
) -> None:
    m, k, n = shape
    base = [random_input(m, k), torch.randn(n, k) * 0.3, torch.randn(n), torch.rand(k) + 0.5, torch.randn(m, k)]
    scale = statistic_scale(base[1], layer) * 0.6
    codes = quantise_weight(base[1], layer, scale)
    grad, grad_stream = torch.randn(m, n), torch.randn(m, k)

    leaves = [t.clone().requires_grad_() for t in (*base, scale)]
    x, weight, bias, norm, delta, learned = leaves
    (y,), stream = shared_bit_linear(
        x, delta, WeightCodes(codes.codes, codes.row_scale(), largest=layer.largest_code), [weight], bias=bias,
        norm_weight=norm, norm_eps=EPS, inputs=inputs, backend=backend, learned=[learned],
        limits=[layer.largest_code],
    )  # fmt: skip
    torch.autograd.backward([y, stream], [grad, grad_stream])

    oracle = [t.clone().requires_grad_() for t in (*base, scale)]
    x, weight, bias, norm, delta, learned = oracle
    total = x + delta
    normed = rms_norm(total, norm, EPS)[0]
    normed = rotate(normed) if inputs.hadamard else normed
    values = normed if inputs.bits is None else through(normed, quantise_inputs(normed.detach(), inputs).dequantise())
    plain = F.linear(values, learned_values(weight, learned, codes, layer.largest_code), bias)
    torch.autograd.backward([plain, total], [grad, grad_stream])
    assert close(y.detach(), plain.detach())
    assert torch.equal(stream, total)
    for name, got, wanted in zip(("x", "w", "bias", "norm", "delta", "scale"), leaves, oracle, strict=True):
        factor = 1 / math.sqrt(weight.numel() / len(scale) * layer.largest_code) if name == "scale" else 1.0
        assert wanted.grad is not None
        assert close(got.grad, wanted.grad * factor, 2e-4 if name == "scale" else 3e-5), name


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("inputs", [INPUTS[1], INPUTS[4], INPUTS[6], INPUTS[8], INPUTS[9]], ids=str)
def test_a_gated_input_is_the_gate_before_the_op(backend: Backend, activation: str, inputs: InputQuant) -> None:
    base = [torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.randn(7, 12), torch.rand(12) + 0.5]
    codes, grad = quantise_weight(base[2], LayerQuant()), torch.randn(2, 5, 7)

    def run(fused: bool) -> tuple[Tensor, ...]:
        up, gate, weight, norm = (t.clone().requires_grad_() for t in base)
        inner = F.silu(gate) if activation == "silu" else F.relu(gate).square()
        (y,), stream = shared_bit_linear(
            up if fused else inner * up, None, WeightCodes(codes.codes, codes.row_scale()), [weight],
            gate=gate if fused else None, activation=activation if fused else "", norm_weight=norm, norm_eps=EPS,
            inputs=inputs, backend=backend,
        )  # fmt: skip
        assert stream is (up if fused else stream)
        return y, *torch.autograd.grad(y, (up, gate, weight, norm), grad)

    for got, wanted in zip(run(True), run(False), strict=True):
        assert close(got.detach(), wanted.detach())


@pytest.mark.parametrize("inputs", [INPUTS[1], INPUTS[4], INPUTS[6], InputQuant(), FLOAT_INPUTS], ids=str)
def test_stacked_layers_of_different_bits_get_their_own_gradients(backend: Backend, inputs: InputQuant) -> None:
    layers = [
        LayerQuant(),
        LayerQuant("symmetric", bits=8, groups="row"),
        LayerQuant("symmetric", bits=4, group_rows=2),
    ]
    rows, x, grads = (3, 4, 6), random_input(11, 24), [torch.randn(11, n) for n in (3, 4, 6)]
    weights = [torch.randn(n, 24) for n in rows]
    scales = [statistic_scale(w, layer) * 0.6 for w, layer in zip(weights, layers, strict=True)]
    codes = [quantise_weight(*three) for three in zip(weights, layers, scales, strict=True)]
    stack = WeightCodes(torch.cat([c.codes for c in codes]), torch.cat([c.row_scale() for c in codes]), largest=127)

    def together() -> list[Tensor | None]:
        mine = [t.clone().requires_grad_() for t in (x, *weights, *scales)]
        learned: list[Tensor | None] = [mine[4], None, mine[6]]
        outputs, _ = shared_bit_linear(
            mine[0], None, stack, mine[1:4], rows=rows, inputs=inputs, backend=backend, learned=learned,
            limits=[layer.largest_code for layer in layers],
        )  # fmt: skip
        torch.autograd.backward(outputs, grads)
        assert mine[5].grad is None
        return [y.detach() for y in outputs] + [t.grad for t in (mine[0], *mine[1:4], mine[4], mine[6])]

    def apart() -> list[Tensor | None]:
        mine = [t.clone().requires_grad_() for t in (x, *weights, *scales)]
        outputs = []
        for i, (own, layer) in enumerate(zip(codes, layers, strict=True)):
            single = WeightCodes(own.codes, own.row_scale(), largest=layer.largest_code)
            (y,), _ = shared_bit_linear(
                mine[0], None, single, [mine[1 + i]], inputs=inputs, backend=backend,
                learned=[mine[4 + i] if i != 1 else None], limits=[layer.largest_code],
            )  # fmt: skip
            outputs.append(y)
        torch.autograd.backward(outputs, grads)
        return [y.detach() for y in outputs] + [t.grad for t in (mine[0], *mine[1:4], mine[4], mine[6])]

    for got, wanted in zip(together(), apart(), strict=True):
        assert close(got, wanted)


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_strides_and_leading_dimensions_do_not_matter(backend: Backend, inputs: InputQuant) -> None:
    base, weight, grad = torch.randn(12, 6, 4), torch.randn(10, 12), torch.randn(4, 6, 10)
    codes = quantise_weight(weight, LayerQuant())
    results = []
    for dense in (False, True):
        x = base.permute(2, 1, 0)
        x = (x.contiguous() if dense else x).detach().requires_grad_()
        w = weight.clone().requires_grad_()
        assert x.is_contiguous() is dense
        y = bit_linear(x, codes.codes, codes.row_scale(), w, inputs=inputs, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, (x, w), grad)))
    for strided, contiguous in zip(*results, strict=True):
        assert close(strided, contiguous)
    for leading in ((), (0,), (3, 0)):
        x = torch.randn(*leading, 12, requires_grad=True)
        y = bit_linear(x, codes.codes, codes.row_scale(), None, inputs=inputs, backend=backend)
        assert y.shape == (*leading, 10)
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        assert grad_x.shape == x.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_a_bad_token_gives_a_nan_row(backend: Backend, inputs: InputQuant, bad: float) -> None:
    x, codes = torch.randn(5, 24), quantise_weight(torch.randn(9, 24), LayerQuant())
    clean = bit_linear(x, codes.codes, codes.row_scale(), None, inputs=inputs, backend=backend)
    x[3, 7] = bad
    y = bit_linear(x, codes.codes, codes.row_scale(), None, inputs=inputs, backend=backend)
    assert bool(y[3].isnan().all())
    if inputs.granularity == "tensor":
        assert bool(y.isnan().all())
    else:
        assert torch.allclose(y[[0, 1, 2, 4]], clean[[0, 1, 2, 4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_packed_codes_give_the_same(backend: Backend, inputs: InputQuant, tokens: int) -> None:
    x, codes = random_input(tokens, 60), quantise_weight(torch.randn(10, 60), LayerQuant())
    weights = WeightCodes(codes.codes, codes.row_scale())
    packed = weights._replace(codes=pack_quarters(codes.codes))
    with torch.inference_mode():
        (wanted,), _ = shared_bit_linear(x, None, weights, [None], inputs=inputs, backend=backend)
        (got,), _ = shared_bit_linear(x, None, packed, [None], inputs=inputs, backend=backend)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("policy", list(itertools.product(("auto", "bf16", "int8"), repeat=2)))
@pytest.mark.parametrize("inputs", [INPUTS[1], INPUTS[4], INPUTS[6]], ids=str)
def test_the_precision_of_gradients_is_the_one_that_was_asked_for(
    backend: Backend, inputs: InputQuant, policy: tuple[str, str]
) -> None:
    x, weight, grad = random_input(40, 24), torch.randn(20, 24), torch.randn(40, 20)
    codes = quantise_weight(weight, LayerQuant())

    def run(dx: str, dw: str) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = bit_linear(leaves[0], codes.codes, codes.row_scale(), leaves[1], inputs=inputs, backend=backend,
                       gradient=GradientPolicy(dx, dw))  # fmt: skip
        return torch.autograd.grad(y, leaves, grad)

    got, exact = run(*policy), run("auto", "auto")
    for precision, mine, full in zip(policy, got, exact, strict=True):
        noise = ((mine - full).norm() / full.norm()).item()
        if precision == "auto" or (precision == "int8" and mine is got[1] and inputs.granularity == "group"):
            assert noise == 0
        else:
            assert 1e-4 < noise < 0.02


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_under_autocast_the_codes_are_those_of_float32(backend: Backend, inputs: InputQuant) -> None:
    x, norm, weight = random_input(8, 24), torch.rand(24) + 0.5, torch.randn(6, 24)
    codes = quantise_weight(weight, LayerQuant())

    def run(dtype: torch.dtype) -> Tensor:
        return bit_linear(x, codes.codes, codes.row_scale(), weight, norm_weight=norm, norm_eps=EPS, inputs=inputs,
                          out_dtype=dtype, backend=backend)  # fmt: skip

    wanted = run(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(torch.float32), wanted)
        assert torch.equal(run(torch.bfloat16), wanted.bfloat16())


def test_compiled_it_is_one_graph_and_the_same() -> None:
    inputs = InputQuant(4, "absmean", "group", 4, 0.5, True)
    base = [torch.randn(6, 12), torch.randn(6, 12), torch.randn(4, 12), torch.rand(12) + 0.5, torch.tensor([0.7, 0.5])]
    layer = LayerQuant("symmetric", bits=4, groups=2)
    codes = quantise_weight(base[2], layer, base[4])

    def run(x: Tensor, delta: Tensor, weight: Tensor, norm: Tensor, learned: Tensor) -> Tensor:
        (y,), stream = shared_bit_linear(
            x, delta, WeightCodes(codes.codes, codes.row_scale(), largest=7), [weight], norm_weight=norm, norm_eps=EPS,
            inputs=inputs, learned=[learned], limits=[7],
        )  # fmt: skip
        return torch.cat([y, stream], 1)

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in base]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        assert close(got, wanted)
