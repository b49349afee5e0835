"""Reading a ``gguf-*`` export back into our own Decoder: codes and scales as they are in the file."""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, cast

import torch
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import LONGEST_CONTEXT, assemble_decoder
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.gguf.blocks import BLOCK, as_float32
from bitnet_train.export.gguf.file import GgufFile
from bitnet_train.export.gguf.layouts import unpack_i2_s, unpack_tq1_0, unpack_tq2_0
from bitnet_train.export.gguf.plan import Container, GgmlType, PlannedTensor, planned_tensors
from bitnet_train.export.gguf.tokenizer_metadata import tokenizer_from_metadata
from bitnet_train.export.gguf.writer import unpermuted
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.config import Activation, DecoderConfig, Norms, check_decoder
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import Role
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import SCALE_FLOOR, Codes

# Architecture -> norms and activation.
ARCHITECTURES = {
    "bitnet-b1.58": (Norms.pre_sub, Activation.relu2),
    "bitnet": (Norms.pre_sub, Activation.silu),
    "llama": (Norms.pre, Activation.silu),
}
TERNARY = {GgmlType.tq1_0, GgmlType.tq2_0, GgmlType.i2_s}


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds: shape, which layers are quantised, codes, and every other tensor in float32."""

    cfg: DecoderConfig
    spec: QuantSpec
    codes: dict[str, Codes]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def decoder(self, backend: Backend | None = None) -> Decoder:
        """A float32 Decoder in eval mode."""
        return assemble_decoder(self.cfg, self.spec, self.codes, self.tensors, backend)


def gguf_path(folder: Path) -> Path | None:
    """The GGUF file of an export's folder, or None."""
    return next((folder / c.file_name for c in Container if (folder / c.file_name).is_file()), None)


def load_gguf(
    folder: Path, device: torch.device | str = "cpu", backend: Backend | None = None
) -> tuple[Decoder, TextTokenizer]:
    """The model (float32, eval mode, without master weights) and the tokenizer of a ``gguf-*`` export.

    Raises ConfigError when the folder has no such file, or a damaged one.
    """
    path = gguf_path(folder)
    if path is None:
        raise ConfigError(f"{folder} holds no GGUF file: export again.")
    model = read_gguf(path, device)
    return model.decoder(backend), tokenizer_from_metadata(model.metadata)


def read_gguf(path: Path, device: torch.device | str = "cpu") -> GgufModel:
    """The model in a GGUF file of a ternary BitNet or llama. Raises ConfigError for a damaged or another file."""
    if find_spec("gguf") is None:
        raise ConfigError(
            f'{path}: GGUF files are read with gguf, not installed here: pip install "bitnet-train[export]".'
        )
    file = GgufFile(path)
    cfg = _decoder_config(file)
    kinds = {name: _kind(file, name) for name in file.tensors}
    plan = planned_tensors(cfg, QuantSpec(FLOAT), Container.i2_s, ExportConfig())
    wanted = {tensor.name for tensor in plan}
    for name in sorted(wanted ^ set(kinds)):
        raise ConfigError(f"{path}: {name} is {'missing' if name in wanted else 'not part of its architecture'}.")
    codes: dict[str, Codes] = {}
    tensors: dict[str, Tensor] = {}
    floats = []
    for tensor in plan:
        if file.tensors[tensor.name].shape != tensor.parameter.shape:
            shape = file.tensors[tensor.name].shape
            raise ConfigError(f"{path}: {tensor.name} has the shape {shape} instead of {tensor.parameter.shape}.")
        stored = PlannedTensor(tensor.name, tensor.parameter, kinds[tensor.name], tensor.permuted_heads)
        if stored.type in TERNARY:
            if stored.parameter.role is not Role.linear:
                raise ConfigError(f"{path}: {stored.name} is {stored.type.name}; only linear layers are.")
            found = _read_codes(file, stored)
            codes[tensor.parameter.layer_name] = Codes(found.codes.to(device), found.scale.to(device))
        else:
            tensors[tensor.parameter.name] = _read_floats(file, stored).to(device)
            if stored.parameter.role is Role.linear:
                floats.append((tensor.parameter.layer_name, FLOAT))
    groups = tuple((name, LayerQuant(groups=len(c.scale))) for name, c in codes.items() if len(c.scale) > 1)
    return GgufModel(cfg, QuantSpec(LayerQuant(), (*floats, *groups)), codes, tensors, file.metadata)


def _decoder_config(file: GgufFile) -> DecoderConfig:
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: the architecture is {short_repr(arch)}; only {', '.join(ARCHITECTURES)} are read here."
        )
    norms, activation = ARCHITECTURES[arch]

    def number(key: str, kind: type) -> Any:
        value: Any = file.metadata.get(f"{arch}.{key}")
        if type(value) is not kind or not math.isfinite(cast(float, value)):
            raise ConfigError(f"{file.path}: {arch}.{key} is {short_repr(value)}, which is no {kind.__name__}.")
        return value

    cfg = DecoderConfig(
        hidden=number("embedding_length", int),
        layers=number("block_count", int),
        heads=number("attention.head_count", int),
        kv_heads=number("attention.head_count_kv", int),
        ffn=number("feed_forward_length", int),
        context=number("context_length", int),
        vocab=number("vocab_size", int),
        norms=norms,
        activation=activation,
        tie_embeddings="output.weight" not in file.tensors,
        rope_theta=as_float32(number("rope.freq_base", float)),
        norm_eps=as_float32(number("attention.layer_norm_rms_epsilon", float)),
    )
    try:
        check_decoder(cfg)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None
    if cfg.context > LONGEST_CONTEXT:
        raise ConfigError(
            f"{file.path}: context_length is {cfg.context:,}; {LONGEST_CONTEXT:,} is the most that is read here."
        )
    # Before any table of that many layers is made from a damaged number.
    if cfg.layers > len(file.tensors):
        raise ConfigError(f"{file.path} has {len(file.tensors)} tensors, too few for {cfg.layers:,} blocks.")
    if number("rope.dimension_count", int) != cfg.head_dim:
        raise ConfigError(f"{file.path}: only rotary positions over the whole head are read here.")
    return cfg


def _kind(file: GgufFile, name: str) -> GgmlType:
    try:
        return GgmlType(file.tensors[name].type)
    except ValueError:
        raise ConfigError(f"{file.path}: {name} is of ggml's type {file.tensors[name].type}, not read here.") from None


def _read_codes(file: GgufFile, tensor: PlannedTensor) -> Codes:
    rows, columns = tensor.parameter.shape
    if columns % tensor.type.block:
        raise file.damaged(f"{tensor.name} has rows of {columns} weights")
    data = torch.from_numpy(file.data(tensor.name, tensor.bytes).copy())
    try:
        if tensor.type is GgmlType.i2_s:
            codes, value = unpack_i2_s(data, rows, columns)
            scale = torch.tensor([value])
        else:
            unpack = unpack_tq1_0 if tensor.type is GgmlType.tq1_0 else unpack_tq2_0
            codes, scales = unpack(data.reshape(rows, -1), columns)
            scale = _row_scales(codes, scales, file, tensor)
    except ValueError as error:
        raise ConfigError(f"{file.path}: {tensor.name}: {error}.") from None
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ConfigError(f"{file.path}: {tensor.name} has a scale that is not positive and finite.")
    if tensor.permuted_heads:
        codes = unpermuted(codes, tensor.permuted_heads)
        scale = unpermuted(scale, tensor.permuted_heads) if len(scale) > 1 else scale
    return Codes(codes, scale[:1].clone() if bool((scale == scale[0]).all()) else scale)


def _row_scales(codes: Tensor, scales: Tensor, file: GgufFile, tensor: PlannedTensor) -> Tensor:
    """One scale for each row, float32 (N,), of the scales of its blocks, (N, blocks)."""
    # A block without any weight may carry the scale zero, as other writers leave it.
    used = codes.reshape(*scales.shape, BLOCK).any(-1)
    scale = scales.amax(1)
    if bool(torch.isfinite(scales).all()) and not bool((scales == scale[:, None])[used].all()):
        raise ConfigError(f"{file.path}: {tensor.name} has several scales in a row, which is not read here.")
    # Nothing depends on the scale of a row that has no weights at all.
    return torch.where((scale == 0) & ~used.any(1), scale.max().clamp(min=SCALE_FLOOR), scale)


def _read_floats(file: GgufFile, tensor: PlannedTensor) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    shape = tensor.parameter.shape
    if shape[-1] % tensor.type.block:
        raise file.damaged(f"{tensor.name} has rows of {shape[-1]} numbers")
    data = file.data(tensor.name, tensor.bytes).reshape(prod(shape[:-1]), -1)
    values = quants.dequantize(data, GGMLQuantizationType(tensor.type.value))
    result = torch.from_numpy(values.copy()).reshape(shape).float()
    if not bool(torch.isfinite(result).all()):
        raise ConfigError(f"{file.path}: {tensor.name} holds numbers that are not finite: it is damaged.")
    return unpermuted(result, tensor.permuted_heads) if tensor.permuted_heads else result
