"""The layer benchmark: every shape and number of tokens in turn, the layers of one in alternating rounds."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bitnet_train.benchmarking.config import BenchmarkConfig
from bitnet_train.benchmarking.layers import Layer, Shape, builders, kept_bytes, model_shapes, ternary_weights
from bitnet_train.benchmarking.noise import gradient_noise
from bitnet_train.benchmarking.probes import measure_rates
from bitnet_train.benchmarking.timing import Spread, alternate, one_line, spread, timed
from bitnet_train.kernels.backend import Backend, choose_backend
from bitnet_train.planning.roofline import DeviceRates, ceiling, layer_prediction
from bitnet_train.quant.activations import TokenCodes
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.config import RunConfig, batch_plan
from bitnet_train.training.device import Choices

Say = Callable[[str], None]
GPU_TOKENS = [4096, 8192, 16384, 32768]
# Seconds that a timed round of one layer takes at least: short calls are repeated, so that starting them on a GPU,
# which overlaps with the work before, is not what is measured.
ROUND_SECONDS = 0.01
MATMULS = ("bf16 matmul", "int8 matmul", "packed int8 matmul")


@dataclass
class LayerResult:
    """Seconds per call, one per round, and what else is known of a layer."""

    name: str
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    kept_bytes: int | None = None
    noise: dict[str, float] = field(default_factory=dict)
    predicted_forward: float | None = None
    predicted_both: float | None = None


@dataclass
class ShapeResult:
    """All layers of one shape at one number of tokens, and the bare matmuls."""

    shape: Shape
    tokens: int
    layers: dict[str, LayerResult] = field(default_factory=dict)
    matmuls: dict[str, list[float]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str | None:
        """nn.Linear, compiled where there is one."""
        names = [n for n in ("nn.Linear compiled", "nn.Linear eager") if n in self.layers and self.layers[n].both]
        return names[0] if names else None

    def times(self, name: str) -> tuple[Spread, Spread]:
        """Forward, and forward with backward, of a layer."""
        layer = self.layers[name]
        return spread(layer.forward), spread(layer.both)

    def speed(self, name: str) -> float | None:
        """Forward and backward relative to the reference."""
        if self.reference is None:
            return None
        return self.times(self.reference)[1].median / self.times(name)[1].median

    def tflops(self, name: str) -> float:
        """Forward and backward: three matmuls' operations per second, in 10^12."""
        return 6e-12 * self.tokens * self.shape.k * self.shape.n / self.times(name)[1].median

    @property
    def r(self) -> float | None:
        """int8 over bf16 matmul speed, both measured in this run."""
        if not all(self.matmuls.get(name) for name in MATMULS[:2]):
            return None
        return spread(self.matmuls[MATMULS[0]]).median / spread(self.matmuls[MATMULS[1]]).median

    def share_of_ceiling(self, name: str) -> float | None:
        """Speed over the reference as a share of 3/(2/r+1)."""
        speed, r = self.speed(name), self.r
        return None if speed is None or r is None else speed / ceiling(r)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for layers.json."""
        done = [name for name, layer in self.layers.items() if layer.both]
        return {
            "k": self.shape.k,
            "rows": list(self.shape.rows),
            "tokens": self.tokens,
            "reference": self.reference,
            "layers": {
                name: asdict(self.layers[name]) | {"speed": self.speed(name), "tflops": self.tflops(name)}
                for name in done
            },
            "matmul_seconds": self.matmuls,
            "int8_over_bf16": self.r,
            "ceiling": None if self.r is None else ceiling(self.r),
            "share_of_ceiling": {name: self.share_of_ceiling(name) for name in done if name.startswith("ternary")},
            "not_measured": self.not_measured,
        }


@dataclass
class LayerResults:
    """The whole layer benchmark; ``complete`` is false when it was interrupted."""

    shapes: list[ShapeResult] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for layers.json."""
        return {
            "complete": self.complete,
            "device_rates": self.rates,
            "shapes": [result.as_dict() for result in self.shapes if result.layers],
        }


def run_layers(cfg: RunConfig, bench: BenchmarkConfig, choices: Choices, results: LayerResults, say: Say) -> None:
    """Measure into ``results``, which hold everything so far at any moment."""
    device = torch.device(choices.device)
    backend = choose_backend(device, cfg.kernels.backend).backend
    rates = measure_rates(device, backend)
    results.rates = asdict(rates)
    given = bench.shapes
    shapes = model_shapes(cfg.decoder, build_spec(cfg.quant)) if given is None else [Shape(k, (n,)) for k, n in given]
    plan = batch_plan(cfg.trainer, cfg.text.sequence_length)
    default = GPU_TOKENS if device.type == "cuda" else [plan.micro_batch * cfg.text.sequence_length]
    for shape in shapes:
        for tokens in bench.tokens or default:
            result = ShapeResult(shape, tokens)
            results.shapes.append(result)
            say(f"layer {shape.label()}, {tokens:,} tokens")
            _measure(result, bench, backend, rates, device, choices.compile, cfg.seed)
            for name, reason in result.not_measured.items():
                say(f"  {name} not measured: {reason}")
            if result.reference is not None:
                speeds = [f"{name} {result.speed(name):.2f}x" for name in result.layers if result.layers[name].both]
                say(f"  forward and backward, relative to {result.reference}: {', '.join(speeds)}")
    results.complete = True


def _measure(
    result: ShapeResult, bench: BenchmarkConfig, backend: Backend, rates: DeviceRates, device: torch.device,
    compiled: bool, seed: int,
) -> None:  # fmt: skip
    shape, tokens = result.shape, result.tokens
    synchronise = torch.cuda.synchronize if device.type == "cuda" else _nothing
    calls: dict[str, Callable[[], object]] = {}
    targets: dict[str, list[float]] = {}
    for build in builders(backend, shape, tokens, device, compiled, seed):
        name = "a layer"
        try:
            layer = build()
            name = layer.name
            measured = LayerResult(name)
            forward, both = _calls(layer)
            for _ in range(bench.warmup):
                forward()
                both()
            measured.kept_bytes = kept_bytes(layer)
            if layer.policy is not None:
                weights, _ = ternary_weights(backend, shape, device, layer.policy.resolve("bf16")[0], seed)
                measured.noise = gradient_noise(backend, weights, tokens, layer.policy, seed)
        except Exception as error:
            result.not_measured[name] = one_line(error)
            continue
        figures = (tokens, shape.k, shape.n, layer.work, layer.compute, rates)
        measured.predicted_forward = layer_prediction(*figures, backward=False)
        measured.predicted_both = layer_prediction(*figures, backward=True)
        result.layers[name] = measured
        for what, call, target in (("forward", forward, measured.forward), ("both", both, measured.both)):
            calls[f"{name}: {what}"], targets[f"{name}: {what}"] = call, target
    for name, call in _bare_matmuls(backend, shape, tokens, device, seed).items():
        try:
            call()
        except Exception as error:
            result.not_measured[name] = one_line(error)
            continue
        calls[name], targets[name] = call, result.matmuls.setdefault(name, [])

    def failed(name: str, error: Exception) -> None:
        result.not_measured[name] = one_line(error)

    alternate(
        {name: _repeated(call, synchronise) for name, call in calls.items()},
        bench.rounds,
        lambda name, seconds: targets[name].append(seconds),
        failed,
        lambda number: None,
    )


def _calls(layer: Layer) -> tuple[Callable[[], object], Callable[[], object]]:
    grads = [torch.randn_like(y) for y in layer.forward(layer.x)]
    return lambda: layer.forward(layer.x), lambda: layer.backward(grads)


def _repeated(call: Callable[[], object], synchronise: Callable[[], None]) -> Callable[[int], float]:
    """Seconds per call, of as many calls as fill a round."""
    once = max(min(timed(call, synchronise) for _ in range(2)), 1e-7)
    times = max(1, math.ceil(ROUND_SECONDS / once))

    def work() -> None:
        for _ in range(times):
            call()

    return lambda number: timed(work, synchronise) / times


def _bare_matmuls(
    backend: Backend, shape: Shape, tokens: int, device: torch.device, seed: int
) -> dict[str, Callable[[], object]]:
    """(tokens, K) x (K, N) in bf16 and as codes; with Triton also with weights packed in 2 bits."""
    weights, _ = ternary_weights(backend, shape, device, "bf16", seed)
    codes = torch.randint(-127, 128, (tokens, shape.k), dtype=torch.int8, device=device)
    x = TokenCodes(codes, torch.ones(tokens, 1, device=device))
    a, b = codes.to(torch.bfloat16), weights.codes.to(torch.bfloat16).t()
    found: dict[str, Callable[[], object]] = {
        MATMULS[0]: lambda: a @ b,
        MATMULS[1]: lambda: backend.matmul(x, weights, None, torch.bfloat16),
    }
    if backend.name == "triton":
        from bitnet_train.kernels.triton.matmul import int8_matmul_packed
        from bitnet_train.kernels.triton.weights import pack_into

        packed = torch.empty(shape.n, -(-shape.k // 4), dtype=torch.uint8, device=device)
        pack_into(weights.codes, packed)
        found[MATMULS[2]] = lambda: int8_matmul_packed(
            x.codes, packed, x.scale, weights.row_scale, None, torch.bfloat16
        )
    return found


def _nothing() -> None:
    """A CPU has nothing to wait for."""
