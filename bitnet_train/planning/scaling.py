"""What a recipe would need on many GPUs, on paper: memory, bytes on the wire and step time of each way to share it out.

Per GPU and step, with W GPUs, P parameters, Q of them quantised, m micro-batches and ``r = (W-1)/W``, the share of a
tensor that a ring passes on (NCCL's own figures: nccl-tests, doc/PERFORMANCE.md; an all-reduce goes around twice):

====================  =============================  =============================================================
way                   bytes on the wire              memory
====================  =============================  =============================================================
ddp                   2r * 4P, once                  everything on every GPU, and 4P of buckets for gradients
fsdp, bf16 weights    m * r * (2*2P + 4P)            masters, gradients, optimizer state and codes 1/W each; two
                                                     blocks and the embedding gathered in bf16 (2 bytes)
fsdp, 2-bit codes     m * r * (2*(Q/4 + 2(P-Q))      as before, but quantised weights of two blocks as codes, 2 bits
                      + 4P)                          on the wire and 1 byte when unpacked
====================  =============================  =============================================================

FSDP gathers weights for the forward and again for the backward pass of every micro-batch, and reduces and scatters
gradients in float32 after each. Rings run at the speed of NVLink inside a node and of one network card per GPU beyond.
Computing takes the time of :mod:`bitnet_train.planning.roofline`, with the optimizer's share 1/W under FSDP. A step
lies between both at once (``overlapped``: the longer one) and one after the other (``in_turn``: their sum). Nothing is
assumed to fail, wait or start up; validation and checkpoints are not counted.
"""

from dataclasses import asdict, dataclass
from typing import Any

from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import block_linears, quantised_layers
from bitnet_train.planning.config import EstimateConfig
from bitnet_train.planning.gpus import GPUS, Gpu, assumed_rates
from bitnet_train.planning.memory import FLOAT32, TrainingMemory, training_memory
from bitnet_train.planning.parameters import ParameterCounts, count_parameters
from bitnet_train.planning.roofline import LinearWork, StepWork, step_prediction
from bitnet_train.quant.spec import QuantSpec, build_spec
from bitnet_train.training.config import RunConfig, step_sequences
from bitnet_train.training.optimizers.config import MuonConfig

WAYS = ("ddp", "fsdp, bf16 weights", "fsdp, 2-bit codes")
BF16 = 2


@dataclass(frozen=True)
class Plan:
    """One way to share a recipe out among ``gpus``; bytes and seconds of one GPU and step."""

    gpus: int
    way: str
    # Sequences of one GPU in a step, in how many micro-batches of how many.
    sequences: int
    micro_batches: int
    micro_batch: int
    # Tokens of all GPUs in a step; more than the recipe's where there are more GPUs than sequences.
    step_tokens: int
    memory: dict[str, float]
    wire_bytes: float
    computing: float
    communicating: float

    @property
    def memory_total(self) -> float:
        """Bytes."""
        return sum(self.memory.values())

    @property
    def overlapped(self) -> float:
        """Seconds of a step that computes and communicates at once."""
        return max(self.computing, self.communicating)

    @property
    def in_turn(self) -> float:
        """Seconds of a step that first computes and then communicates."""
        return self.computing + self.communicating

    def tokens_per_second(self, seconds: float) -> float:
        """Of all GPUs, when a step takes ``seconds``."""
        return self.step_tokens / seconds

    def as_dict(self) -> dict[str, Any]:
        """For estimate.json."""
        return asdict(self) | {
            "memory_total": self.memory_total,
            "overlapped": self.overlapped,
            "in_turn": self.in_turn,
        }


def ring_share(gpus: int) -> float:
    """Share of a tensor that each GPU of a ring sends in a reduce-scatter or an all-gather."""
    return (gpus - 1) / gpus


def wire_bytes(way: str, counts: ParameterCounts, gpus: int, micro_batches: int) -> float:
    """Bytes that each GPU sends in a step; see the table above."""
    gradients = FLOAT32 * counts.total
    if way == WAYS[0]:
        return 2 * ring_share(gpus) * gradients
    weights: float = BF16 * counts.total
    if way == WAYS[2]:
        weights = counts.quantised / 4 + BF16 * (counts.total - counts.quantised)
    return micro_batches * ring_share(gpus) * (2 * weights + gradients)


def memory_per_gpu(
    way: str, memory: TrainingMemory, model: DecoderConfig, spec: QuantSpec, counts: ParameterCounts, gpus: int
) -> dict[str, float]:
    """Bytes by component; see the table above."""
    activations = float(sum(memory.activations.values()))
    fixed = {
        "master weights": memory.master_weights,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer_state,
        "codes": memory.code_buffers,
    }
    if way == WAYS[0]:
        gathered = memory.compute_copies + FLOAT32 * counts.total
        return {**{name: float(size) for name, size in fixed.items()}, "buckets, copies": gathered,
                "activations": activations}  # fmt: skip
    shapes, quantised = block_linears(model), quantised_layers(model, spec)
    block = max(
        sum(
            n * k * (1 if way == WAYS[2] and f"layers.{layer}.{name}" in quantised else BF16)
            for name, (n, k) in shapes.items()
        )
        for layer in range(model.layers)
    )
    gathered = 2 * block + BF16 * (counts.embedding + counts.head)
    return {**{name: size / gpus for name, size in fixed.items()}, "gathered": float(gathered),
            "activations": activations}  # fmt: skip


def plan_scaling(cfg: RunConfig, settings: EstimateConfig) -> list[Plan]:
    """Every way for every number of GPUs in ``estimate.gpus``."""
    gpu, spec = GPUS[settings.gpu], build_spec(cfg.quant)
    model, counts = cfg.decoder, count_parameters(cfg.decoder, build_spec(cfg.quant))
    length = cfg.text.sequence_length
    sequences = step_sequences(cfg.trainer, length)
    found = []
    for gpus in settings.gpus or []:
        own = -(-sequences // gpus)
        micro = min(own, _micro_batch(cfg, own))
        count = -(-own // micro)
        memory = training_memory(
            model, spec, micro, length, cfg.trainer.precision, cfg.optimizer, cfg.trainer.activation_checkpointing
        )
        for way in WAYS:
            sent = wire_bytes(way, counts, gpus, count)
            found.append(
                Plan(
                    gpus, way, own, count, micro, max(sequences, gpus) * length,
                    memory_per_gpu(way, memory, model, spec, counts, gpus),
                    sent, _computing(cfg, spec, own, count, gpu, settings, 1 if way == WAYS[0] else gpus),
                    sent / (settings.network_share * (gpu.nvlink if gpus <= settings.gpus_per_node else gpu.network)),
                )
            )  # fmt: skip
    return found


def _micro_batch(cfg: RunConfig, own: int) -> int:
    """The recipe's micro-batch; under auto and null all of a GPU's sequences at once."""
    return cfg.trainer.micro_batch if isinstance(cfg.trainer.micro_batch, int) else own


def _computing(
    cfg: RunConfig, spec: QuantSpec, own: int, micro_batches: int, gpu: Gpu, settings: EstimateConfig, shards: int
) -> float:
    dx, dw = spec.gradient.resolve("bf16")
    quantised = quantised_layers(cfg.decoder, spec)
    linears = {}
    for layer in range(cfg.decoder.layers):
        for name in block_linears(cfg.decoder):
            full = f"layers.{layer}.{name}"
            forward = "int8" if full in quantised and spec.for_layer(full).activation_bits else "bf16"
            ours = LinearWork("fused ternary", forward, dx, dw)
            linears[full] = ours if full in quantised else LinearWork("compiled dense", "bf16", "bf16", "bf16")
    iterations = cfg.optimizer.ns_steps if isinstance(cfg.optimizer, MuonConfig) else 0
    length = cfg.text.sequence_length
    again = cfg.trainer.activation_checkpointing
    work = StepWork(own * length, micro_batches, length, "bf16", linears, iterations, again)
    terms = step_prediction(cfg.decoder, work, assumed_rates(gpu, settings))
    return sum(seconds / (shards if name == "optimizer" else 1) for name, seconds in terms.items())
