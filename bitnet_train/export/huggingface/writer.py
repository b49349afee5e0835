"""The writer of the ``hf-*`` formats: folders that ``transformers`` loads as BitNetForCausalLM or LlamaForCausalLM.

``hf-packed`` packs codes four to a byte; ``weight_scale`` is direct for ``linear_class: autobitlinear``, which
multiplies by it, and inverse for ``bitlinear``, which divides. ``hf-master`` holds the master weights, which the
consumer ternarises in every forward pass, so that it can go on training. ``hf-dense`` holds codes times scales as plain
weights.
"""

from pathlib import Path

import torch
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.folder import replaced_folder, write_json, write_origin
from bitnet_train.export.huggingface.model_config import generation_config, hf_name, model_config, zero_biases
from bitnet_train.export.huggingface.tokenizer_files import write_tokenizer
from bitnet_train.export.huggingface.variant import Storage, Variant
from bitnet_train.export.sizes import ExportSize
from bitnet_train.export.tensor_file import TensorFileWriter, TensorInfo
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import parameter_table, quantised_layers
from bitnet_train.quant.packing import pack_2bit
from bitnet_train.quant.spec import CODES_PER_BYTE, QuantSpec

WEIGHTS = "model.safetensors"


def tensor_infos(cfg: DecoderConfig, spec: QuantSpec, variant: Variant) -> dict[str, TensorInfo]:
    """Name -> type and shape of every tensor of model.safetensors."""
    infos: dict[str, TensorInfo] = {}
    quantised = quantised_layers(cfg, spec) if variant.storage is Storage.packed else {}
    for parameter in parameter_table(cfg):
        if parameter.layer_name in quantised:
            rows, columns = parameter.shape
            infos[hf_name(parameter.name)] = TensorInfo(torch.uint8, (rows // CODES_PER_BYTE, columns))
            infos[f"{hf_name(parameter.name)}_scale"] = TensorInfo(variant.torch_dtype, (1,))
        else:
            infos[hf_name(parameter.name)] = TensorInfo(variant.torch_dtype, parameter.shape)
    return infos | {name: TensorInfo(variant.torch_dtype, shape) for name, shape in zero_biases(cfg).items()}


def export_size(cfg: DecoderConfig, spec: QuantSpec, variant: Variant) -> ExportSize:
    """The sizes of an export's tensors, from the configuration alone."""
    infos = tensor_infos(cfg, spec, variant)
    weights = {hf_name(f"{layer}.weight") for layer in quantised_layers(cfg, spec)}
    codes = {name for name in infos if name.removesuffix("_scale") in weights}
    embedding = {"model.embed_tokens.weight", "lm_head.weight"}
    sizes = {p.name: p.size for p in parameter_table(cfg)}
    return ExportSize(
        total_bytes=sum(info.bytes for info in infos.values()),
        code_bytes=sum(infos[name].bytes for name in codes),
        embedding_bytes=sum(info.bytes for name, info in infos.items() if name in embedding),
        code_weights=sum(sizes[name.removeprefix("model.")] for name in weights),
    )


def stored_scale(scale: Tensor, variant: Variant) -> Tensor:
    """``weight_scale`` (1,) for a direct scale float32 (1,), in the type and the convention of the variant."""
    return (scale.reciprocal() if variant.inverse_scales else scale).to(variant.torch_dtype)


def direct_scale(stored: Tensor, variant: Variant) -> Tensor:
    """The direct scale, float32, of a ``weight_scale``: one that :func:`stored_scale` turns into the same value again.

    The float32 next to 1 / stored may have another inverse, so its neighbours are tried as well.
    """
    wide = stored.float()
    if not variant.inverse_scales:
        return wide
    nearest = wide.reciprocal()
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    for candidate in (nearest, torch.nextafter(nearest, down), torch.nextafter(nearest, up)):
        if torch.equal(candidate.reciprocal().to(stored.dtype), stored):
            return candidate
    return nearest


def effective_scale(scale: Tensor, variant: Variant) -> Tensor:
    """The scale that the consumer multiplies by in effect, float32, for a direct scale."""
    stored = stored_scale(scale, variant).float()
    return stored.reciprocal() if variant.inverse_scales else stored


def write_huggingface(canonical: CanonicalCheckpoint, tokenizer: TextTokenizer, folder: Path, variant: Variant) -> None:
    """Write the export to ``folder``, replacing an older one in a rename: it appears whole or not at all.

    Raises ConfigError when a weight is not finite or the folder cannot be written.
    """
    with replaced_folder(folder) as partial:
        cfg, spec = canonical.cfg, canonical.spec
        _write_weights(canonical, partial / WEIGHTS, variant)
        write_json(partial / "config.json", model_config(cfg, spec, tokenizer.bos_id, tokenizer.eos_id, variant))
        write_json(partial / "generation_config.json", generation_config(cfg, tokenizer.bos_id, tokenizer.eos_id))
        write_tokenizer(tokenizer, partial, cfg.context)
        write_origin(partial, variant.storage.value, canonical.step)


def _write_weights(canonical: CanonicalCheckpoint, path: Path, variant: Variant) -> None:
    infos = tensor_infos(canonical.cfg, canonical.spec, variant)
    dtype = variant.torch_dtype
    with TensorFileWriter(path, infos, {}) as file:
        for name in canonical.tensor_names:
            file.write(hf_name(name), canonical.tensor(name).to(dtype))
        for name, shape in zero_biases(canonical.cfg).items():
            file.write(name, torch.zeros(shape, dtype=dtype))
        for layer in canonical.quantised:
            name = hf_name(f"{layer}.weight")
            if variant.storage is Storage.master:
                file.write(name, canonical.tensor(f"{layer}.weight").to(dtype))
                continue
            codes = canonical.codes(layer)
            if variant.storage is Storage.dense:
                file.write(name, codes.dequantise().to(dtype))
            else:
                file.write(name, pack_2bit(codes.codes))
                file.write(f"{name}_scale", stored_scale(codes.scale, variant))
