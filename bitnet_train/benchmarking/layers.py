"""Single linear layers: ours by gradient policy beside nn.Linear, the textbook's and torchao's.

Every layer is timed forward, and forward with backward, on a bf16 input without a norm. Layers that read one input are
one product of ours, and one nn.Linear of as many outputs, which is the strongest rival. Ours has its codes, which
training derives once per step; the others quantise as their libraries do, in every forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.benchmarking.peers import load_peer, peer_obstacle
from bitnet_train.benchmarking.step import compiled_alone
from bitnet_train.benchmarking.textbook import TextbookBitLinear
from bitnet_train.kernels.backend import Backend, WeightCodes
from bitnet_train.kernels.op import shared_bit_linear
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.kept import counting_kept
from bitnet_train.nn.layout import block_linears
from bitnet_train.planning.roofline import SHARED, LinearWork
from bitnet_train.quant.spec import GradientPolicy, LayerQuant, QuantSpec

# Precisions of dX and dW. The order is that of the tables.
POLICIES = (("bf16", "bf16"), ("int8", "bf16"), ("fp8", "bf16"), ("int8", "int8"))


@dataclass(frozen=True)
class Shape:
    """Inputs and the outputs of each layer that reads them."""

    k: int
    rows: tuple[int, ...]

    @property
    def n(self) -> int:
        """Outputs in all."""
        return sum(self.rows)

    def label(self) -> str:
        """``512 x 1536 (3 layers)``."""
        readers = f" ({len(self.rows)} layers)" if len(self.rows) > 1 else ""
        return f"{self.k} x {self.n}{readers}"


@dataclass(frozen=True)
class Layer:
    """A layer to time: ``forward`` maps its ``x`` to the outputs, ``leaves`` receive gradients beside x."""

    name: str
    forward: Callable[[Tensor], Sequence[Tensor]]
    x: Tensor
    leaves: Sequence[Tensor]
    # For the roofline.
    work: LinearWork
    compute: str
    # For the signal to noise: what our policy is.
    policy: GradientPolicy | None = None

    def backward(self, grads: Sequence[Tensor]) -> None:
        """Forward and backward, gradients of x and of the leaves."""
        torch.autograd.grad(self.forward(self.x), [self.x, *self.leaves], grads)


def model_shapes(cfg: DecoderConfig, spec: QuantSpec) -> list[Shape]:
    """Every distinct shape of quantised layers, those that read one input together."""
    found: dict[Shape, None] = {}
    for block in range(cfg.layers):
        rows: dict[str, list[int]] = {}
        widths: dict[str, int] = {}
        for name, (n, k) in block_linears(cfg).items():
            if spec.for_layer(f"layers.{block}.{name}").quantised:
                group = SHARED.get(name, name)
                rows.setdefault(group, []).append(n)
                widths[group] = k
        found |= {Shape(widths[group], tuple(outputs)): None for group, outputs in rows.items()}
    return list(found)


def ternary_weights(
    backend: Backend, shape: Shape, device: torch.device, dx: str, seed: int
) -> tuple[WeightCodes, list[Tensor]]:
    """Codes and master weights (n, K) float32 of random layers, as a CodeCache keeps them."""
    generator = torch.Generator().manual_seed(seed)
    masters = [torch.randn(n, shape.k, generator=generator).to(device) for n in shape.rows]
    codes = torch.empty(shape.n, shape.k, dtype=torch.int8, device=device)
    backward = backend.backward_layout(codes, dx)
    parts = [None] * len(masters) if backward is None else torch.split(backward, list(shape.rows), dim=1)
    scales = [
        backend.quantise_weight(master, LayerQuant(), own, part).row_scale()
        for master, own, part in zip(masters, torch.split(codes, list(shape.rows)), parts, strict=True)
    ]
    return WeightCodes(codes, torch.cat(scales), backward), [m.requires_grad_() for m in masters]


def own_layer(backend: Backend, shape: Shape, x: Tensor, policy: tuple[str, str], compiled: bool, seed: int) -> Layer:
    """Our layer with gradients in ``policy``."""
    gradient = GradientPolicy(*policy)
    dx, dw = gradient.resolve("bf16")
    weights, masters = ternary_weights(backend, shape, x.device, dx, seed)
    rows = list(shape.rows)

    def forward(x: Tensor) -> Sequence[Tensor]:
        return shared_bit_linear(
            x, None, weights, masters, rows=rows, out_dtype=torch.bfloat16, backend=backend, gradient=gradient
        )[0]

    name = f"ternary dx={policy[0]} dw={policy[1]}"
    work = LinearWork("fused ternary", "int8", dx, dw)
    return Layer(name, _maybe_compiled(forward, name, compiled), x, masters, work, "bf16", gradient)


def linear_layer(shape: Shape, x: Tensor, compiled: bool) -> Layer:
    """nn.Linear with bf16 weights, all outputs as one."""
    linear = nn.Linear(shape.k, shape.n, bias=False, device=x.device, dtype=torch.bfloat16)

    def forward(x: Tensor) -> Sequence[Tensor]:
        return [F.linear(x, linear.weight)]

    name = f"nn.Linear {'compiled' if compiled else 'eager'}"
    work = LinearWork("linear", "bf16", "bf16", "bf16")
    return Layer(name, _maybe_compiled(forward, name, compiled), x, [linear.weight], work, "bf16")


def textbook_layer(shape: Shape, x: Tensor, compiled: bool) -> Layer:
    """The FAQ's BitLinear without its norm, float32 weights under bf16 autocast; one layer after the other."""
    layers = [TextbookBitLinear(nn.Parameter(torch.randn(n, shape.k, device=x.device)), None) for n in shape.rows]

    def forward(x: Tensor) -> Sequence[Tensor]:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return [layer(x) for layer in layers]

    mode = "compiled" if compiled else "eager"
    work = LinearWork(f"{mode} textbook", "bf16", "bf16", "bf16")
    weights = [layer.weight for layer in layers]
    return Layer(f"textbook {mode}", _maybe_compiled(forward, "textbook", compiled), x, weights, work, "bf16")


def torchao_layer(shape: Shape, x: Tensor, compiled: bool) -> Layer:
    """torchao's bitnet_training() layers: bf16 compiled on a GPU, float32 eager on a CPU."""
    load_peer("torchao")
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    on_gpu = x.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    linears = nn.ModuleList(nn.Linear(shape.k, n, bias=False, device=x.device, dtype=dtype) for n in shape.rows)
    quantize_(linears, bitnet_training())

    def forward(x: Tensor) -> Sequence[Tensor]:
        return [linear(x) for linear in linears]

    compiled = compiled and on_gpu
    mode, compute = ("compiled" if compiled else "eager"), ("bf16" if on_gpu else "fp32")
    work = LinearWork("compiled textbook" if compiled else "eager torchao", "int8", compute, compute)
    weights: list[Tensor] = [linear.weight for linear in linears]  # type: ignore[misc]
    own_x = x.detach().to(dtype).requires_grad_()
    name = f"torchao {compute} {mode}"
    return Layer(name, _maybe_compiled(forward, "torchao", compiled), own_x, weights, work, compute)


def builders(
    backend: Backend, shape: Shape, tokens: int, device: torch.device, compiled: bool, seed: int
) -> list[Callable[[], Layer]]:
    """What builds each layer: nn.Linear first, then ours, then the others."""
    x = torch.randn(tokens, shape.k, device=device, dtype=torch.bfloat16).requires_grad_()
    found: list[Callable[[], Layer]] = [partial(linear_layer, shape, x, False)]
    if compiled:
        found.append(partial(linear_layer, shape, x, True))
    # The CPU multiplies no fp8: a policy that only emulates it would not be worth a row.
    policies = [policy for policy in POLICIES if policy[0] != "fp8" or has_fp8(device)]
    found += [partial(own_layer, backend, shape, x, policy, compiled, seed) for policy in policies]
    found.append(partial(textbook_layer, shape, x, compiled))
    if peer_obstacle("torchao", device.type) is None:
        found.append(partial(torchao_layer, shape, x, compiled))
    return found


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def kept_bytes(layer: Layer) -> int:
    """Bytes that a forward keeps for its backward: saved tensors, each storage once, without the parameters."""
    with counting_kept(layer.leaves) as kept:
        outputs = layer.forward(layer.x)
    del outputs
    return kept.nbytes


def _maybe_compiled(
    forward: Callable[[Tensor], Sequence[Tensor]], name: str, compiled: bool
) -> Callable[[Tensor], Sequence[Tensor]]:
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return compiled_alone(forward, plain) if compiled else forward  # type: ignore[arg-type,return-value]
