"""Sizes of what a run leaves on disk: checkpoints and exports."""

from dataclasses import dataclass

from bitnet_train.export.config import ExportDtype
from bitnet_train.nn.config import ModelConfig
from bitnet_train.nn.layout import Role, learned_scales, parameter_table, quantised_layers
from bitnet_train.planning.optimizer_state import optimizer_state
from bitnet_train.planning.parameters import count_scales
from bitnet_train.quant.spec import CODES_PER_BYTE, QuantSpec
from bitnet_train.training.optimizers.config import AdamWConfig, OptimizerConfig

FLOAT32 = 4
# torch.save's zip entry, name and padding included, for one tensor of a checkpoint (measured).
ENTRY_BYTES = 320
# 3^5 = 243 fits into a byte: 1.6 bits per code, the densest whole-byte packing of ternary codes.
TERNARY_PER_BYTE = 5
BINARY_PER_BYTE = 8
# Bits that a symmetric code takes: those of its kind, in whole codes to a byte.
STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}


def checkpoint_bytes(cfg: ModelConfig, spec: QuantSpec, optimizer: OptimizerConfig | None = None) -> int:
    """Size of a training checkpoint: float32 weights and learned scales and the optimizer's state (AdamW's if none is
    given), and the file's entries."""
    table, scales = parameter_table(cfg), learned_scales(cfg, spec)
    state = optimizer_state(optimizer or AdamWConfig(), cfg)
    weights = FLOAT32 * sum(p.size for p in table) + state.bytes
    entries = len(table) + state.tensors + 4 * len(scales)  # a scale, two moments and a count of steps
    return weights + 3 * FLOAT32 * count_scales(cfg, spec) + ENTRY_BYTES * entries


@dataclass(frozen=True)
class ExportSize:
    """Bytes of an export in one packing of the codes."""

    packing: str
    without_embeddings: int
    total: int


def export_sizes(cfg: ModelConfig, spec: QuantSpec, dtype: ExportDtype) -> list[ExportSize]:
    """Sizes with the codes at 2 bits and in their densest packing, and with every weight a float of type ``dtype``.

    Tensors that are not codes have type ``dtype``; every scale is float32. Embeddings are the embedding and an untied
    head.
    """
    size = 4 if dtype is ExportDtype.float32 else 2
    layers = quantised_layers(cfg, spec)
    schemes = {layer.scheme for layer in layers.values()}
    packings: dict[str, dict[str, int]] = {}
    if schemes == {"symmetric"}:
        packings["codes of their bits"] = {"symmetric": 1}
    elif schemes:
        packings["2 bits per code"] = dict.fromkeys(schemes, CODES_PER_BYTE)
        if "ternary" in schemes:
            packings["five codes a byte"] = {"ternary": TERNARY_PER_BYTE, "binary": CODES_PER_BYTE}
        if "binary" in schemes:
            packings["one bit per binary code"] = {"ternary": CODES_PER_BYTE, "binary": BINARY_PER_BYTE}
    packings[f"all {dtype.value}"] = {}
    return [_size(name, per_byte, cfg, spec, size) for name, per_byte in packings.items()]


def _size(packing: str, per_byte: dict[str, int], cfg: ModelConfig, spec: QuantSpec, size: int) -> ExportSize:
    layers = quantised_layers(cfg, spec) if per_byte else {}
    body = embeddings = 0
    for parameter in parameter_table(cfg):
        layer = layers.get(parameter.layer_name)
        if layer is not None:
            codes = 8 // STORED_BITS[layer.bits] if layer.bits else per_byte[layer.scheme]
            body += -(-parameter.size // codes) + FLOAT32 * layer.group_count(parameter.shape[0])
        elif parameter.role in (Role.embedding, Role.head):
            embeddings += size * parameter.size
        else:
            body += size * parameter.size
    return ExportSize(packing, body, body + embeddings)
