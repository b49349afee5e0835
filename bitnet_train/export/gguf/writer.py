"""The writer of the ``gguf-*`` formats: one tensor at a time, codes and scales as they were trained."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.folder import replaced_folder, write_origin
from bitnet_train.export.gguf.layouts import pack_i2_s, pack_q6_k, pack_tq1_0, pack_tq2_0
from bitnet_train.export.gguf.plan import Container, GgmlType, PlannedTensor, model_metadata, planned_tensors
from bitnet_train.export.gguf.tokenizer_metadata import tokenizer_metadata
from bitnet_train.quant.weights import Codes

# Rows of an embedding that are converted at once.
ROWS = 4096


def write_gguf(
    canonical: CanonicalCheckpoint,
    tokenizer: TextTokenizer,
    folder: Path,
    container: Container,
    cfg: ExportConfig,
    name: str,
) -> None:
    """Write the export to ``folder``, replacing an older one in a rename; ``name`` becomes ``general.name``.

    Raises ConfigError when a weight is not finite, the tokenizer has no GGUF form, or the folder cannot be written.
    """
    from gguf import GGUFWriter
    from gguf.gguf_writer import TensorInfo as GgufTensorInfo

    metadata = file_metadata(canonical, tokenizer, container, name, cfg)
    plan = planned_tensors(canonical.cfg, canonical.spec, container, cfg)
    with replaced_folder(folder) as partial:
        file = GGUFWriter(partial / container.file_name, metadata["general.architecture"])
        file.kv_data[0].clear()  # our own order, the architecture first
        for key, value in metadata.items():
            _add(file, key, value)
        for tensor in plan:
            # Not add_tensor_info: gguf-py knows no type 36.
            kind: Any = tensor.type.value
            info = GgufTensorInfo(shape=tensor.parameter.shape, dtype=kind, nbytes=tensor.bytes)
            file.tensors[0][tensor.name] = info
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for tensor in plan:
            file.write_tensor_data(_data(canonical, tensor))
        file.close()
        write_origin(partial, container.value, canonical.step)


def file_metadata(
    canonical: CanonicalCheckpoint, tokenizer: TextTokenizer, container: Container, name: str, cfg: ExportConfig
) -> dict[str, Any]:
    """Every key of the file with its value, in order.

    Those of I2_S are the official file's, and ``tokenizer.ggml.pre``, which that file lacks to its users' harm
    (microsoft/BitNet pull request 508).
    """
    metadata = model_metadata(canonical.cfg, container, name) | tokenizer_metadata(tokenizer, canonical.cfg.vocab)
    if cfg.license is not None and container is not Container.i2_s:
        metadata["general.license"] = cfg.license
    return metadata


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows (out, ...) of q or k in the order of llama.cpp's ``llama`` architecture, which rotates neighbouring pairs.

    Hugging Face's rotate the two halves of a head: row ``j`` of half ``h`` moves to ``2 * j + h``.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`permuted`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _data(canonical: CanonicalCheckpoint, tensor: PlannedTensor) -> np.ndarray:
    name = tensor.parameter.name
    if tensor.type in (GgmlType.tq1_0, GgmlType.tq2_0, GgmlType.i2_s):
        return _packed(canonical.codes(tensor.parameter.layer_name), tensor).numpy()
    values = canonical.tensor(name)
    if tensor.permuted_heads:
        values = permuted(values, tensor.permuted_heads)
    return float_data(values, tensor.type)


def _packed(codes: Codes, tensor: PlannedTensor) -> Tensor:
    rows, row_scale = codes.codes, codes.row_scale()
    if tensor.permuted_heads:
        rows, row_scale = permuted(rows, tensor.permuted_heads), permuted(row_scale, tensor.permuted_heads)
    if tensor.type is GgmlType.i2_s:
        return pack_i2_s(rows, float(codes.scale))
    if float(row_scale.max()) > torch.finfo(torch.float16).max:
        raise ConfigError(f"{tensor.name}: its scale is too large for {tensor.type.name}, which keeps it as float16.")
    return (pack_tq1_0 if tensor.type is GgmlType.tq1_0 else pack_tq2_0)(rows, row_scale)


def float_data(values: Tensor, kind: GgmlType) -> np.ndarray:
    """Float32 values (..., K) in a type of ggml, in parts, so that a large embedding is not held several times."""
    from gguf import GGMLQuantizationType, quants

    if kind in (GgmlType.f32, GgmlType.f16):
        return values.to(torch.float32 if kind is GgmlType.f32 else torch.float16).contiguous().numpy()
    if kind is GgmlType.bf16:
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    parts = []
    for part in values.split(ROWS):
        if kind is GgmlType.q6_k:
            parts.append(pack_q6_k(part).numpy())
        else:
            parts.append(quants.quantize(part.contiguous().numpy(), GGMLQuantizationType.Q8_0))
    return np.concatenate(parts)


def _add(file: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        file.add_bool(key, value)
    elif isinstance(value, int):
        file.add_uint32(key, value)
    elif isinstance(value, float):
        file.add_float32(key, value)
    elif isinstance(value, str):
        file.add_string(key, value)
    else:
        file.add_array(key, value)
