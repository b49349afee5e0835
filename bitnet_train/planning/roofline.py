"""The shortest time that a training step or a layer can take on a device whose rates are known: plain arithmetic.

``time = operations / matmul rate of their type + bytes of the passes that touch memory / memory bandwidth``, summed, as
if nothing overlapped. It leaves out what no rate explains (launches, threads waiting, small matrices below the measured
rate) and counts caches as too small for whole tensors, so a measured time lies near it from either side. T tokens,
V words, H hidden, P parameters, K inputs and N outputs of a linear layer, c bytes of the compute type, r of the
residual stream; operations count 2 per multiply-add:

==================  ====================================================================================================
term                amount
==================  ====================================================================================================
block matmuls       forward, dX and dW: 2*T*K*N operations each, at the rate of the type each runs in
attention           3 * 4*T*H*(sequence/2) per block, at the rate of the compute type
head and loss       3 * 2*T*V*H at the rate of the compute type; logits: 6 passes of c*T*V bytes
activations         bytes per token and element of a layer's input and output, see below
weights             bytes per weight of a linear layer, per micro-batch and per step, see below
optimizer           40*P bytes: norm (4), clip (8), AdamW (reads w, g, m, v: 16; writes w, m, v: 12)
computed again      where activation checkpointing is on: the blocks' forward once more; under selective without
                    attention and products narrower than their input (see :mod:`bitnet_train.nn.recompute`)
orthogonalisation   Muon alone: per iteration 4*s*s*l + 2*s*s*s operations of bf16 for each matrix of the blocks, s its
                    shorter and l its longer side
==================  ====================================================================================================

Bytes per element, forward + backward. "shared" counts each distinct input of a block once (q, k, v read one), "each"
every layer's input, "weight" is per micro-batch, "refresh" once per step:

==================  ================================  ============  ================  ====================  =======
style               shared                            each          output            weight                refresh
==================  ================================  ============  ================  ====================  =======
fused ternary       (2r+c+2) + (3r+2c+1)              0             2c + (3c+2)       1 + (1+4)             9
compiled dense      (2r+3c) + (3r+3c)                 0             2c + 3c           (4+2c) + (2c+4)       0
eager dense         (48+3c) + 2*(48+c)                0             6c + 9c           (4+2c) + (2c+4)       0
compiled textbook   (2r+3c) + (3r+3c)                 0             2c + 3c           (8+2c) + (2c+4)       0
eager textbook      (c+16) + 2*16                     96+c + 60     6c + 9c           (68+c) + (c+12)       0
eager torchao       (48+2c) + 2*48                    40+1 + 13     22+4c + 9c        (41+1) + (9+4)        0
==================  ================================  ============  ================  ====================  =======

fused ternary: reads the stream and what is added to it, writes the stream and int8 codes, multiplies the codes; the
backward reads the codes again for dW, the stream and its gradient for the norm; dY is written, quantised and read as
codes for dX and as floats for dW; codes are derived once per step from two reads of the weights. dense: the same passes
with floats, and float32 weights are cast for autocast in every micro-batch (counted in fp32 too, where it is small
beside the matmul). eager: every operation of norm, residual, activation and rotary positions is a pass. textbook: the
quantisers of figure 3 of the FAQ, one pass per operation in eager mode (17 float32 passes over an input, 68 bytes per
weight). torchao: quantisers likewise, int32 products scaled in two passes. Every micro-batch after the first adds 8
bytes per weight for adding gradients up.

A layer on its own has no norm and no residual stream, its input is of the compute type, and weights are quantised
beforehand where that happens once per step (forward + backward):

==================  ====================  ====================  ================================
style               input                 output                weight
==================  ====================  ====================  ================================
fused ternary       (c+2) + (c+1)         c + (2c+2)            1 + (1+4)
linear              c + 2c                c + 2c                c + 2c
compiled textbook   3c + 2c               c + 2c                (8+2c) + (2c+4)
eager textbook      (96+c) + (60+2c)      c + 2c                (68+c) + (c+12)
eager torchao       (41+c) + (13+2c)      (20+c) + 2c           (41+1) + (9+4)
==================  ====================  ====================  ================================
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bitnet_train.nn.config import ActivationCheckpointing, DecoderConfig, ResidualDtype
from bitnet_train.nn.layout import block_linears
from bitnet_train.planning.parameters import count_parameters
from bitnet_train.quant.spec import QuantSpec

OPTIMIZER_BYTES = 40
LOGIT_PASSES = 6
ACCUMULATE_BYTES = 8
# Layers of a block that read the same input.
SHARED = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
}


@dataclass(frozen=True)
class DeviceRates:
    """Operations per second of large matmuls by type, and bytes per second of a large copy (read plus written)."""

    fp32: float
    bf16: float
    int8: float
    fp8: float
    bandwidth: float

    def matmul(self, kind: str) -> float:
        """Operations per second of a matmul in ``kind``: fp32, bf16, int8 or fp8."""
        return float(getattr(self, kind))


@dataclass(frozen=True)
class Bytes:
    """``r`` per byte of the residual type, ``c`` per byte of the compute type, and a fixed number."""

    r: float = 0
    c: float = 0
    fixed: float = 0

    def of(self, residual: int, compute: int) -> float:
        """Bytes per element."""
        return self.r * residual + self.c * compute + self.fixed


@dataclass(frozen=True)
class Passes:
    """Bytes per element in one direction; see the table."""

    shared: Bytes
    each: Bytes
    output: Bytes
    weight: Bytes


@dataclass(frozen=True)
class Style:
    """How a linear layer is computed: passes forward and backward, and bytes per weight once per step."""

    forward: Passes
    backward: Passes
    refresh: float = 0


_DENSE_WEIGHT = Bytes(c=2, fixed=4)
STYLES = {
    "fused ternary": Style(
        Passes(Bytes(2, 1, 2), Bytes(), Bytes(c=2), Bytes(fixed=1)),
        Passes(Bytes(3, 2, 1), Bytes(), Bytes(c=3, fixed=2), Bytes(fixed=5)),
        refresh=9,
    ),
    "compiled dense": Style(
        Passes(Bytes(2, 3), Bytes(), Bytes(c=2), _DENSE_WEIGHT),
        Passes(Bytes(3, 3), Bytes(), Bytes(c=3), _DENSE_WEIGHT),
    ),
    "eager dense": Style(
        Passes(Bytes(c=3, fixed=48), Bytes(), Bytes(c=6), _DENSE_WEIGHT),
        Passes(Bytes(c=2, fixed=96), Bytes(), Bytes(c=9), _DENSE_WEIGHT),
    ),
    "compiled textbook": Style(
        Passes(Bytes(2, 3), Bytes(), Bytes(c=2), Bytes(c=2, fixed=8)),
        Passes(Bytes(3, 3), Bytes(), Bytes(c=3), _DENSE_WEIGHT),
    ),
    "eager textbook": Style(
        Passes(Bytes(c=1, fixed=16), Bytes(c=1, fixed=96), Bytes(c=6), Bytes(c=1, fixed=68)),
        Passes(Bytes(fixed=32), Bytes(fixed=60), Bytes(c=9), Bytes(c=1, fixed=12)),
    ),
    "eager torchao": Style(
        Passes(Bytes(c=2, fixed=48), Bytes(fixed=41), Bytes(c=4, fixed=22), Bytes(fixed=42)),
        Passes(Bytes(fixed=96), Bytes(fixed=13), Bytes(c=9), Bytes(fixed=13)),
    ),
}


_NOTHING = Bytes()
LAYER_STYLES = {
    "fused ternary": Style(
        Passes(_NOTHING, Bytes(c=1, fixed=2), Bytes(c=1), Bytes(fixed=1)),
        Passes(_NOTHING, Bytes(c=1, fixed=1), Bytes(c=2, fixed=2), Bytes(fixed=5)),
    ),
    "linear": Style(
        Passes(_NOTHING, Bytes(c=1), Bytes(c=1), Bytes(c=1)),
        Passes(_NOTHING, Bytes(c=2), Bytes(c=2), Bytes(c=2)),
    ),
    "compiled textbook": Style(
        Passes(_NOTHING, Bytes(c=3), Bytes(c=1), Bytes(c=2, fixed=8)),
        Passes(_NOTHING, Bytes(c=2), Bytes(c=2), _DENSE_WEIGHT),
    ),
    "eager textbook": Style(
        Passes(_NOTHING, Bytes(c=1, fixed=96), Bytes(c=1), Bytes(c=1, fixed=68)),
        Passes(_NOTHING, Bytes(c=2, fixed=60), Bytes(c=2), Bytes(c=1, fixed=12)),
    ),
    "eager torchao": Style(
        Passes(_NOTHING, Bytes(c=1, fixed=41), Bytes(c=1, fixed=20), Bytes(fixed=42)),
        Passes(_NOTHING, Bytes(c=2, fixed=13), Bytes(c=2), Bytes(fixed=13)),
    ),
}


@dataclass(frozen=True)
class LinearWork:
    """A linear layer: a key of STYLES, and the types of its three matmuls."""

    style: str
    forward: str
    dx: str
    dw: str


@dataclass(frozen=True)
class StepWork:
    """A training step: tokens in all, in how many micro-batches, of which length, and the compute type (bf16, fp32).

    ``linears`` says how each linear layer of the blocks runs, by its full name; ``newton_schulz`` is the number of
    iterations with which Muon orthogonalises their updates, 0 for AdamW. ``checkpointing`` says what the backward pass
    computes again.
    """

    tokens: int
    micro_batches: int
    sequence_length: int
    compute: str
    linears: Mapping[str, LinearWork]
    newton_schulz: int = 0
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none


def step_prediction(cfg: DecoderConfig, work: StepWork, rates: DeviceRates) -> dict[str, float]:
    """Seconds by term; their sum is the predicted step."""
    compute, residual = (2 if work.compute == "bf16" else 4), _residual_bytes(cfg)
    float_rate = rates.matmul(work.compute)
    tokens, micro = work.tokens, work.micro_batches
    matmuls = activations = weights = again = 0.0
    for block in range(cfg.layers):
        met: set[str] = set()
        for name, (n, k) in block_linears(cfg).items():
            linear = work.linears[f"layers.{block}.{name}"]
            style = STYLES[linear.style]
            matmuls += matmul_seconds(tokens, k, n, (linear.forward, linear.dx, linear.dw), rates)
            first = SHARED.get(name, name) not in met
            for passes in (style.forward, style.backward):
                activations += _touched(passes, tokens, k, n, first, residual, compute)
                weights += micro * n * k * passes.weight.of(residual, compute)
            if work.checkpointing is not ActivationCheckpointing.none:
                again += _touched(style.forward, tokens, k, n, first, residual, compute) / rates.bandwidth
                if work.checkpointing is ActivationCheckpointing.full or n >= k:
                    again += matmul_seconds(tokens, k, n, (linear.forward,), rates)
                    again += micro * n * k * style.forward.weight.of(residual, compute) / rates.bandwidth
            met.add(SHARED.get(name, name))
            weights += n * k * (style.refresh + ACCUMULATE_BYTES * (micro - 1))
    # Of a forward pass.
    attention = 4.0 * tokens * cfg.layers * cfg.attention_width * (work.sequence_length / 2) / float_rate
    if work.checkpointing is ActivationCheckpointing.full:
        again += attention
    parameters = count_parameters(cfg, QuantSpec()).total
    muon = sum(newton_schulz_operations(n, k) for n, k in block_linears(cfg).values()) * cfg.layers * work.newton_schulz
    return {
        "block matmuls": matmuls,
        "attention": 3 * attention,
        "head and loss": (
            3 * 2.0 * tokens * cfg.vocab * cfg.hidden / float_rate
            + LOGIT_PASSES * compute * tokens * cfg.vocab / rates.bandwidth
        ),
        "activations": activations / rates.bandwidth,
        "weights": weights / rates.bandwidth,
        "optimizer": OPTIMIZER_BYTES * parameters / rates.bandwidth,
        **({"orthogonalisation": muon / rates.bf16} if muon else {}),
        **({"computed again": again} if again else {}),
    }


def _touched(passes: Passes, tokens: int, k: int, n: int, first: bool, residual: int, compute: int) -> float:
    """Bytes of activations in one direction of a layer (K, N), ``first`` if no layer before it read its input."""
    shared = passes.shared.of(residual, compute) if first else 0
    inputs = k * (passes.each.of(residual, compute) + shared)
    return tokens * (inputs + n * passes.output.of(residual, compute))


def newton_schulz_operations(n: int, k: int) -> int:
    """Operations of one of Muon's iterations, ``a X + (b A + c A A) X`` with ``A = X X^T``, on a matrix (n, k)."""
    short, long = min(n, k), max(n, k)
    return 4 * short * short * long + 2 * short**3


def matmul_seconds(m: int, k: int, n: int, kinds: tuple[str, ...], rates: DeviceRates) -> float:
    """Seconds of one (m, k, n) product in each of ``kinds``."""
    return sum(2.0 * m * k * n / rates.matmul(kind) for kind in kinds)


def layer_prediction(
    m: int, k: int, n: int, linear: LinearWork, compute: str, rates: DeviceRates, backward: bool
) -> float:
    """Seconds of one layer (K, N) on m tokens, forward or with its backward; the style is one of LAYER_STYLES."""
    style, size = LAYER_STYLES[linear.style], 2 if compute == "bf16" else 4
    kinds = (linear.forward, linear.dx, linear.dw) if backward else (linear.forward,)
    touched = 0.0
    for passes in (style.forward, style.backward) if backward else (style.forward,):
        touched += m * k * passes.each.of(size, size) + m * n * passes.output.of(size, size)
        touched += n * k * passes.weight.of(size, size)
    return matmul_seconds(m, k, n, kinds, rates) + touched / rates.bandwidth


def ceiling(r: float) -> float:
    """Largest speed-up over bf16 of a layer whose forward and dX run ``r`` times as fast and whose dW does not."""
    return 3.0 / (2.0 / r + 1.0)


def _residual_bytes(cfg: DecoderConfig) -> int:
    return 4 if cfg.residual_dtype is ResidualDtype.float32 else 2
