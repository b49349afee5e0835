"""The op on the Triton backend against the op on the reference: forward, every gradient, every precision."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.backend import BACKENDS, WeightCodes
from bitnet_train.kernels.op import bit_linear, shared_bit_linear
from bitnet_train.kernels.triton.backend import TritonBackend
from bitnet_train.quant.gradients import FP8
from bitnet_train.quant.packing import pack_quarters
from bitnet_train.quant.spec import GradientPolicy, LayerQuant

BACKEND, REFERENCE = TritonBackend(), BACKENDS["reference"]
EPS = 1e-5
SHAPES = [(1, 1, 1), (3, 17, 5), (7, 64, 33), (130, 48, 19)]
POLICIES = [("auto", "auto"), ("bf16", "bf16"), ("int8", "bf16"), ("fp8", "bf16"), ("bf16", "int8"), ("int8", "int8")]


def layers(rows: tuple[int, ...], width: int, device: torch.device) -> tuple[list[Tensor], WeightCodes]:
    masters = [torch.randn(n, width, device=device, requires_grad=True) for n in rows]
    quantised = [REFERENCE.quantise_weight(m, LayerQuant()) for m in masters]
    codes, scales = torch.cat([q.codes for q in quantised]), torch.cat([q.row_scale() for q in quantised])
    return masters, WeightCodes(codes, scales)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("normed", "residual"), [(False, False), (True, True)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_the_references(
    device: torch.device,
    shape: tuple[int, int, int],
    policy: tuple[str, str],
    normed: bool,
    residual: bool,
    out_dtype: torch.dtype,
) -> None:
    m, k, n = shape
    rows = (n, 2, n)
    masters, weights = layers(rows, k, device)
    gradient = GradientPolicy(*policy)
    dx, _ = gradient.resolve("bf16")
    stack = WeightCodes(weights.codes, weights.row_scale, BACKEND.backward_layout(weights.codes, dx))
    x, delta = torch.randn(m, k, device=device), torch.randn(m, k, device=device).bfloat16()
    norm = torch.rand(k, device=device) + 0.5
    grads = [torch.randn(m, r, device=device, dtype=out_dtype) for r in rows]
    grad_stream = torch.randn(m, k, device=device)

    def run(backend: object, stacked: WeightCodes) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.clone().requires_grad_(), delta.clone().requires_grad_(), norm.clone().requires_grad_()]
        outputs, stream = shared_bit_linear(
            leaves[0], leaves[1] if residual else None, stacked, masters, rows=rows, out_dtype=out_dtype,
            norm_weight=leaves[2] if normed else None, norm_eps=EPS, backend=backend, gradient=gradient,
        )  # fmt: skip
        learning = [leaves[0], *([leaves[1]] if residual else []), *([leaves[2]] if normed else []), *masters]
        ends, given = ([*outputs, stream], [*grads, grad_stream]) if residual else (outputs, grads)
        return [*outputs, stream], list(torch.autograd.grad(ends, learning, given))

    got, got_grads = run(BACKEND, stack)
    wanted, wanted_grads = run(REFERENCE, weights)
    for y, expected in zip(got, wanted, strict=True):
        assert y.dtype is expected.dtype
        if normed:  # a norm that sums in another order may round to another code
            assert relative(y, expected) < 0.02
        else:
            assert torch.equal(y, expected)
    # Beyond rounding, a code that the norms round apart moves one term of dW by one step.
    tolerance = 0.02 if normed or "bf16" in (*policy, "bf16" * (out_dtype is torch.bfloat16)) else 1e-5
    for grad, expected in zip(got_grads, wanted_grads, strict=True):
        assert grad.dtype is expected.dtype
        assert relative(grad, expected) < tolerance


@pytest.mark.parametrize("dx", ["bf16", "int8", "fp8"])
def test_the_backward_layout_is_the_transposed_codes(device: torch.device, dx: str) -> None:
    codes = torch.randint(-1, 2, (6, 10), dtype=torch.int8, device=device)
    layout = BACKEND.backward_layout(codes, dx)
    if dx == "bf16":
        assert layout is None
        return
    assert layout is not None
    assert layout.dtype is (torch.int8 if dx == "int8" else FP8)
    assert torch.equal(layout.float(), codes.t().float())
    weight = torch.randn(2, 10, device=device)
    part = layout[:, 4:]
    kept = BACKEND.quantise_weight(weight, LayerQuant(), codes[4:], part)
    fresh = REFERENCE.quantise_weight(weight, LayerQuant())
    assert torch.equal(codes[4:], fresh.codes)
    assert torch.equal(layout[:, 4:].float(), fresh.codes.t().float())
    assert torch.equal(kept.scale, fresh.scale)


@pytest.mark.parametrize("layer", [LayerQuant(groups=2), LayerQuant("binary"), LayerQuant("binary", groups="row")])
def test_weights_are_quantised_as_by_the_reference(device: torch.device, layer: LayerQuant) -> None:
    weight = torch.randn(6, 33, device=device)
    got, wanted = BACKEND.quantise_weight(weight, layer), REFERENCE.quantise_weight(weight, layer)
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_gives_a_nan_row(device: torch.device, bad: float) -> None:
    x, (masters, weights) = torch.randn(5, 20, device=device), layers((7,), 20, device)
    x[3, 4] = bad
    norm = torch.ones(20, device=device)
    y = bit_linear(x, weights.codes, weights.row_scale, masters[0], norm_weight=norm, norm_eps=EPS, backend=BACKEND)
    assert bool(y[3].isnan().all())
    assert bool(torch.isfinite(y[[0, 1, 2, 4]]).all())


def test_it_wants_a_cuda_device() -> None:
    assert BACKEND.unsupported(torch.device("cpu")) == "it needs a CUDA device, not cpu"


@pytest.mark.parametrize("name", ["quantise", "matmul", "grad_input", "grad_weight", "grad_norm"])
def test_operators_are_registered_as_torch_compile_wants_them(device: torch.device, name: str) -> None:
    m, k, n = 5, 12, 9
    x, norm = torch.randn(m, k, device=device), torch.rand(k, device=device)
    codes_x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    codes_w = torch.randint(-1, 2, (n, k), dtype=torch.int8, device=device)
    scale, row_scale = torch.rand(m, 1, device=device), torch.rand(n, device=device)
    grad = torch.randn(m, n, device=device)
    arguments = {
        "quantise": (x, x, norm, EPS),
        "matmul": (codes_x, scale, codes_w, row_scale, row_scale, torch.bfloat16),
        "grad_input": (grad, codes_w, row_scale, None, "int8", torch.bfloat16),
        "grad_weight": (grad, codes_x, scale, "int8"),
        "grad_norm": (x, x, norm, scale, x),
    }[name]
    op = getattr(torch.ops.bitnet_train, f"triton_{name}").default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("shape", [(1, 5, 3), (4, 64, 33), (9, 77, 130)])
def test_packed_weights_give_the_product_of_unpacked_ones(device: torch.device, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    codes = torch.randint(-1, 2, (n, k), device=device).to(torch.int8)
    tokens = REFERENCE.quantise(torch.randn(m, k, device=device), None, None, EPS).codes
    scale, bias = torch.rand(n, device=device), torch.randn(n, device=device)
    wanted = REFERENCE.matmul(tokens, WeightCodes(codes, scale), bias, torch.float32)
    packed = WeightCodes(pack_quarters(codes), scale)
    assert torch.equal(BACKEND.matmul(tokens, packed, bias, torch.float32), wanted)
