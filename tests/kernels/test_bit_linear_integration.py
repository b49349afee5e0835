"""The public op under torch.compile, activation checkpointing and torch's own operator checks."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.backend import BACKENDS, Backend, WeightCodes
from bitnet_train.kernels.op import bit_linear, shared_bit_linear
from bitnet_train.quant.activations import rms_norm
from bitnet_train.quant.spec import GradientPolicy, LayerQuant
from bitnet_train.quant.weights import quantise_weight
from tests.operands import EPS, random_input


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
    if BACKENDS["avx512"].unsupported(torch.device("cpu")) is not None:
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
