"""The writer of the format ``packed``: all that a run can train, in the fewest bytes. See docs/packed_format.md."""

from enum import Enum
from pathlib import Path
from typing import Any

import torch

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.folder import replaced_folder, write_json, write_origin
from bitnet_train.export.packed.layout import pack_codes, packed_bytes
from bitnet_train.export.sizes import ExportSize
from bitnet_train.export.tensor_file import TensorFileWriter, TensorInfo
from bitnet_train.nn.config import DecoderConfig, shape_fields
from bitnet_train.nn.layout import parameter_table, quantised_layers
from bitnet_train.quant.spec import LayerQuant, QuantSpec

NAME = "packed"
WEIGHTS = "model.safetensors"
FORMAT, VERSION = "bitnet_train-packed", 1
# Fields of the model that came after the first files: written where they are not what those meant.
LATER_FIELDS = {"head_width": None, "attention_bias": False, "qk_norm": False}


def packed_infos(cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig) -> dict[str, TensorInfo]:
    """Name -> type and shape of every tensor of model.safetensors."""
    dtype = getattr(torch, export.dtype.value)
    quantised = quantised_layers(cfg, spec)
    infos: dict[str, TensorInfo] = {}
    for parameter in parameter_table(cfg):
        layer = parameter.layer_name
        if layer in quantised:
            infos[f"{layer}.codes"] = TensorInfo(torch.uint8, (packed_bytes(parameter.size, export.packing),))
            groups = quantised[layer].group_count(parameter.shape[0])
            infos[f"{layer}.scale"] = TensorInfo(torch.float32, (groups,))
        else:
            infos[parameter.name] = TensorInfo(dtype, parameter.shape)
    return infos


def packed_size(cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig) -> ExportSize:
    """The sizes of the tensors."""
    infos = packed_infos(cfg, spec, export)
    codes = [info.bytes for name, info in infos.items() if name.endswith((".codes", ".scale"))]
    embedding = [info.bytes for name, info in infos.items() if name in ("embed_tokens.weight", "lm_head.weight")]
    quantised = quantised_layers(cfg, spec)
    weights = sum(p.size for p in parameter_table(cfg) if p.layer_name in quantised)
    return ExportSize(sum(info.bytes for info in infos.values()), sum(codes), sum(embedding), weights)


def scheme_of_codes(layer: LayerQuant) -> str:
    """What the codes in the file are: those of 2-bit symmetric weights are ternary, whatever their scale was."""
    return "ternary" if layer.scheme == "symmetric" else layer.scheme


def packed_config(
    cfg: DecoderConfig, spec: QuantSpec, tokenizer: TextTokenizer, export: ExportConfig
) -> dict[str, Any]:
    """config.json: all that a reader needs beside the tensors."""
    layers = {
        name: {"scheme": scheme_of_codes(layer), "activation_bits": layer.activation_bits}
        for name, layer in quantised_layers(cfg, spec).items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "packing": export.packing.value,
        "dtype": export.dtype.value,
        "model": {
            f.name: value.value if isinstance(value := getattr(cfg, f.name), Enum) else value
            for f in shape_fields()
            if f.name not in LATER_FIELDS or getattr(cfg, f.name) != LATER_FIELDS[f.name]
        },
        "quantised_layers": layers,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }


def write_packed(canonical: CanonicalCheckpoint, tokenizer: TextTokenizer, folder: Path, export: ExportConfig) -> None:
    """Write the export to ``folder``, replacing an older one in a rename: it appears whole or not at all.

    Raises ConfigError when a weight is not finite or the folder cannot be written.
    """
    cfg, spec = canonical.cfg, canonical.spec
    infos = packed_infos(cfg, spec, export)
    with replaced_folder(folder) as partial:
        with TensorFileWriter(partial / WEIGHTS, infos, {"format_name": FORMAT}) as file:
            for name in canonical.tensor_names:
                file.write(name, canonical.tensor(name).to(getattr(torch, export.dtype.value)))
            for layer in canonical.quantised:
                codes = canonical.codes(layer)
                file.write(f"{layer}.codes", pack_codes(codes.codes, export.packing))
                file.write(f"{layer}.scale", codes.scale)
        write_json(partial / "config.json", packed_config(cfg, spec, tokenizer, export))
        tokenizer.save(partial)
        write_origin(partial, NAME, canonical.step)
