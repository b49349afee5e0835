"""What stands in a GGUF file of a model: architecture, metadata keys, tensors with their types, from the configuration.

Names and keys are those of gguf-py (llama.cpp) and, for I2_S, of the official BitNet-b1.58-2B-4T file.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from bitnet_train.export.config import ExportConfig, ExportDtype
from bitnet_train.export.gguf.blocks import BLOCK, I2_S_BLOCK, I2_S_TAIL, Q6_K_BYTES, TQ1_0_BYTES, TQ2_0_BYTES
from bitnet_train.export.limits import foreign_family, foreign_inputs, wide_codes
from bitnet_train.export.sizes import ExportSize
from bitnet_train.nn.config import Activation, DecoderConfig, Norms
from bitnet_train.nn.layout import ParameterInfo, Role, parameter_table, quantised_layers
from bitnet_train.quant.spec import QuantSpec

# Type -> numbers in a block, and the block's bytes (those of I2_S without the scale behind all of them).
BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q6_k": (BLOCK, Q6_K_BYTES),
    "tq1_0": (BLOCK, TQ1_0_BYTES),
    "tq2_0": (BLOCK, TQ2_0_BYTES),
    "i2_s": (I2_S_BLOCK, I2_S_BLOCK // 4),
}


class GgmlType(Enum):
    """Type ids of ggml that are written here; 36 means I2_S in bitnet.cpp's fork only."""

    f32 = 0
    f16 = 1
    q8_0 = 8
    q6_k = 14
    bf16 = 30
    tq1_0 = 34
    tq2_0 = 35
    i2_s = 36

    @property
    def block(self) -> int:
        """Numbers of a row that are stored together."""
        return BLOCKS[self.name][0]


class Container(Enum):
    """The GGUF formats; the value is the format's name."""

    tq2_0 = "gguf-tq2_0"
    tq1_0 = "gguf-tq1_0"
    i2_s = "gguf-i2_s"

    @property
    def weight_type(self) -> GgmlType:
        """The type of ternary weights."""
        return GgmlType[self.name]

    @property
    def file_name(self) -> str:
        """The file in the export's folder; bitnet.cpp's scripts look for its own."""
        return "ggml-model-i2_s.gguf" if self is Container.i2_s else f"model-{self.name.upper()}.gguf"

    @property
    def file_type(self) -> int:
        """``general.file_type`` (llama_ftype; 40 is the fork's)."""
        return {Container.tq1_0: 36, Container.tq2_0: 37, Container.i2_s: 40}[self]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file: its name there, ours, shape, type, and whether rows are reordered for rotary positions."""

    name: str
    parameter: ParameterInfo
    type: GgmlType
    permuted_heads: int | None = None

    @property
    def bytes(self) -> int:
        """Size of its data."""
        size = self.parameter.size
        block, stored = BLOCKS[self.type.name]
        return size // block * stored + (I2_S_TAIL if self.type is GgmlType.i2_s else 0)


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name of our parameter ``name`` in a GGUF file."""
    fixed = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    layer = name.removesuffix(".weight")
    if layer in fixed:
        return f"{fixed[layer]}.weight"
    _, block, inside = layer.split(".", 2)
    return f"blk.{block}.{NAMES[inside]}.weight"


def architecture(cfg: DecoderConfig, container: Container) -> str:
    """``general.architecture``: what decides about sub-norms, activation and rotary positions in the consumer."""
    if cfg.norms is Norms.pre:
        return "llama"
    return "bitnet-b1.58" if container is Container.i2_s and cfg.activation is Activation.relu2 else "bitnet"


def planned_tensors(
    cfg: DecoderConfig, spec: QuantSpec, container: Container, export: ExportConfig
) -> list[PlannedTensor]:
    """Every tensor in the order of the file."""
    quantised = quantised_layers(cfg, spec)
    floats = GgmlType.f32 if export.dtype is ExportDtype.float32 else GgmlType.bf16
    llama = cfg.norms is Norms.pre
    tensors = []
    for parameter in parameter_table(cfg):
        kind = floats
        if parameter.role is Role.norm:
            kind = GgmlType.f32
        elif parameter.role in (Role.embedding, Role.head):
            kind = GgmlType[export.embedding.value]
        elif parameter.layer_name in quantised:
            kind = container.weight_type
        heads = None
        if llama and parameter.name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = cfg.heads if ".q_proj" in parameter.name else cfg.kv_heads
        tensors.append(PlannedTensor(gguf_name(parameter.name), parameter, kind, heads))
    return tensors


def model_metadata(cfg: DecoderConfig, container: Container, name: str) -> dict[str, Any]:
    """The keys about the model, in the order of the official file. Integers are stored as uint32, floats as float32."""
    arch = architecture(cfg, container)
    return {
        "general.architecture": arch,
        "general.name": name,
        f"{arch}.vocab_size": cfg.vocab,
        f"{arch}.context_length": cfg.context,
        f"{arch}.embedding_length": cfg.hidden,
        f"{arch}.block_count": cfg.layers,
        f"{arch}.feed_forward_length": cfg.ffn,
        f"{arch}.rope.dimension_count": cfg.head_dim,
        f"{arch}.attention.head_count": cfg.heads,
        f"{arch}.attention.head_count_kv": cfg.kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": cfg.norm_eps,
        f"{arch}.rope.freq_base": cfg.rope_theta,
        "general.file_type": container.file_type,
        "general.quantization_version": 2,
    }


def gguf_size(cfg: DecoderConfig, spec: QuantSpec, container: Container, export: ExportConfig) -> ExportSize:
    """The sizes of the file's tensors."""
    tensors = planned_tensors(cfg, spec, container, export)
    codes = [t for t in tensors if t.type is container.weight_type]
    return ExportSize(
        total_bytes=sum(t.bytes for t in tensors),
        code_bytes=sum(t.bytes for t in codes),
        embedding_bytes=sum(t.bytes for t in tensors if t.parameter.role in (Role.embedding, Role.head)),
        code_weights=sum(t.parameter.size for t in codes),
    )


def gguf_obstacle(cfg: DecoderConfig, spec: QuantSpec, container: Container, export: ExportConfig) -> str | None:
    """Why a GGUF file of this kind cannot hold the model, or None when it can."""
    layers = quantised_layers(cfg, spec)
    if not layers:
        return "no layer is quantised"
    if found := foreign_family(cfg) or wide_codes(cfg, spec):
        return found
    main_line = container is not Container.i2_s
    for key, default in (("attention_bias", False), ("qk_norm", False), ("head_width", None)):
        if getattr(cfg, key) != default:
            return f"its architectures llama and bitnet are written without it (model.{key}={getattr(cfg, key)})"
    if main_line and cfg.activation is Activation.relu2:
        return "llama.cpp's main line computes SiLU in the FFN, whatever the file says (model.activation=relu2)"
    if cfg.norms is Norms.pre and cfg.activation is Activation.relu2:
        return "the llama architecture computes SiLU in the FFN (model.activation=relu2 with model.norms=pre)"
    if cfg.norms is Norms.pre_sub and not cfg.tie_embeddings:
        return "its BitNet architectures use the embedding as the head (model.tie_embeddings=false)"
    multiple = container.weight_type.block
    shapes = {p.layer_name: p.shape for p in parameter_table(cfg)}
    for name, layer in layers.items():
        rows, columns = shapes[name]
        if columns % multiple:
            return f"its rows are whole blocks of {multiple} weights, and those of {name} have {columns}"
        if layer.activation_bits is None:
            return f"its consumer quantises activations, and the inputs of {name} are floats (quant.activation.bits)"
        if found := foreign_inputs(name, layer):
            return found
        groups = layer.group_count(rows)
        if not main_line and groups != 1:
            return f"it holds one scale per tensor, and {name} has {groups} (quant.weight.groups)"
    blocks = GgmlType[export.embedding.value].block
    if cfg.hidden % blocks:
        return (
            f"export.embedding={export.embedding.value} needs model.hidden in multiples of {blocks}, it is {cfg.hidden}"
        )
    return None
