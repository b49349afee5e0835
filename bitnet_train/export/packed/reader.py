"""Reading the format ``packed`` back: the codes and scales as they are in the file."""

import math
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer, load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import LONGEST_CONTEXT, assemble_decoder
from bitnet_train.export.config import ExportConfig, ExportDtype, Packing
from bitnet_train.export.folder import panics_as_errors, read_json, shown, unreadable
from bitnet_train.export.packed.layout import unpack_codes
from bitnet_train.export.packed.writer import FORMAT, LATER_FIELDS, VERSION, WEIGHTS, packed_infos
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.config import DecoderConfig, check_decoder, shape_fields
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import Role, check_spec, parameter_table
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes


@dataclass(frozen=True)
class PackedModel:
    """What the folder holds: shape, quantisation, codes, and every other tensor in float32."""

    cfg: DecoderConfig
    spec: QuantSpec
    codes: dict[str, Codes]
    tensors: dict[str, Tensor]
    # The type that the tensors had in the file.
    dtype: ExportDtype

    def decoder(self, backend: Backend | None = None) -> Decoder:
        """A float32 Decoder in eval mode."""
        return assemble_decoder(self.cfg, self.spec, self.codes, self.tensors, backend)


def is_packed(folder: Path) -> bool:
    """Whether the folder's config.json says that it is of this format."""
    try:
        return read_json(folder / "config.json").get("format") == FORMAT
    except ConfigError:
        return False


def load_packed(
    folder: Path, device: torch.device | str = "cpu", backend: Backend | None = None
) -> tuple[Decoder, TextTokenizer]:
    """The model (float32, eval mode, without master weights) and the tokenizer. Raises ConfigError."""
    model = read_packed(folder, device)
    return model.decoder(backend), read_packed_tokenizer(folder, model.cfg.vocab)


def read_packed_tokenizer(folder: Path, vocab: int) -> TextTokenizer:
    """The tokenizer of a folder. Raises ConfigError when it is damaged or does not fit a model of ``vocab`` ids."""
    try:
        with panics_as_errors():
            tokenizer = load_tokenizer(folder)
        if not tokenizer.tokenizer.get_vocab_size():
            raise ValueError(f"{folder} holds a tokenizer without any token.")
    except (ConfigError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    config, ids = read_json(folder / "config.json"), (tokenizer.bos_id, tokenizer.eos_id)
    if tokenizer.vocab_size > vocab or not all(0 <= index < vocab for index in ids):
        raise ConfigError(f"{folder}: the tokenizer has ids above the model's vocabulary of {vocab}.")
    if (config.get("bos_token_id"), config.get("eos_token_id")) != ids:
        raise ConfigError(f"{folder}: config.json and the tokenizer's files disagree about the ids of bos and eos.")
    return tokenizer


def read_packed(folder: Path, device: torch.device | str = "cpu") -> PackedModel:
    """The tensors of a folder of the format. Raises ConfigError when it is incomplete, damaged or later."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ConfigError(f"{path}: only the format {FORMAT}, version {VERSION}, is read here.")
    try:
        export = ExportConfig(dtype=ExportDtype(config.get("dtype")), packing=Packing(config.get("packing")))
    except ValueError:
        wrong = f"dtype={short_repr(config.get('dtype'))} or packing={short_repr(config.get('packing'))}"
        raise ConfigError(f"{path}: {wrong} is not known here.") from None
    cfg = _decoder_config(config.get("model"), path)
    weights = folder / WEIGHTS
    codes: dict[str, Codes] = {}
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(weights, framework="pt") as file:
            headers = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                headers[name] = (part.get_dtype(), tuple(part.get_shape()))
            # Before any table of that many layers is made from a damaged number.
            if cfg.layers > len(headers):
                raise ConfigError(f"{weights} has {len(headers)} tensors, too few for {cfg.layers:,} blocks.")
            spec = _spec(config.get("quantised_layers"), headers, cfg, path)
            _check_header(weights, headers, cfg, spec, export)
            shapes = {p.layer_name: p.shape for p in parameter_table(cfg)}
            for name in packed_infos(cfg, spec, export):
                layer, _, part_name = name.rpartition(".")
                if part_name == "scale":
                    continue
                tensor = file.get_tensor(name)
                if part_name == "codes":
                    scale = file.get_tensor(f"{layer}.scale")
                    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
                        raise ConfigError(f"{weights}: {layer}.scale is not positive and finite.")
                    unpacked = unpack_codes(tensor, shapes[layer], export.packing)
                    codes[layer] = Codes(unpacked.to(device), scale.to(device))
                elif not bool(torch.isfinite(tensor).all()):
                    raise ConfigError(f"{weights}: {name} holds numbers that are not finite: it is damaged.")
                else:
                    tensors[name] = tensor.to(device, torch.float32)
    except ValueError as error:
        raise ConfigError(f"{weights}: {error}.") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(unreadable(weights, error)) from None
    return PackedModel(cfg, spec, codes, tensors, export.dtype)


def _decoder_config(found: Any, path: Path) -> DecoderConfig:
    names = {field.name for field in shape_fields()}
    if isinstance(found, dict):
        found = LATER_FIELDS | found
    if not isinstance(found, dict) or set(found) != names:
        raise ConfigError(f"{path}: model must have exactly the fields {', '.join(sorted(names))}.")
    try:
        # OmegaConf holds the values against the dataclass's types; it must not find references to look up.
        if any(isinstance(value, str) and "$" in value for value in found.values()):
            raise ConfigError("a field is a reference.")
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DecoderConfig), found))
        assert isinstance(cfg, DecoderConfig)
        check_decoder(cfg)
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{path}: model: {shown(str(error).splitlines()[0])}") from None
    if not (math.isfinite(cfg.norm_eps) and math.isfinite(cfg.rope_theta)):
        raise ConfigError(
            f"{path}: model.norm_eps={cfg.norm_eps} and model.rope_theta={cfg.rope_theta} must be finite."
        )
    if cfg.context > LONGEST_CONTEXT:
        raise ConfigError(
            f"{path}: model.context is {cfg.context:,}; {LONGEST_CONTEXT:,} is the most that is read here."
        )
    return cfg


def _spec(layers: Any, headers: dict[str, Any], cfg: DecoderConfig, path: Path) -> QuantSpec:
    if not isinstance(layers, dict):
        raise ConfigError(f"{path}: quantised_layers is missing.")
    linears = {p.layer_name for p in parameter_table(cfg) if p.role is Role.linear}
    found = []
    for name, layer in layers.items():
        if name not in linears:
            raise ConfigError(f"{path}: quantised_layers has {shown(name)}, which is no linear layer of the model.")
        shape = headers.get(f"{name}.scale", (None, ()))[1]
        if not isinstance(layer, dict) or set(layer) != {"scheme", "activation_bits"} or len(shape) != 1:
            raise ConfigError(f"{path}: quantised_layers.{name} is damaged.")
        scheme, bits = layer["scheme"], layer["activation_bits"]
        if scheme not in ("ternary", "binary") or bits not in (None, 8) or not shape[0]:
            raise ConfigError(
                f"{path}: quantised_layers.{name} has scheme={short_repr(scheme)}, {shape[0]} scales and "
                f"activation_bits={short_repr(bits)}, which is not known here."
            )
        found.append((name, LayerQuant(scheme, groups=shape[0], activation_bits=bits)))
    spec = QuantSpec(FLOAT, tuple(found))
    try:
        check_spec(cfg, spec)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return spec


def _check_header(
    path: Path, headers: dict[str, Any], cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig
) -> None:
    infos = packed_infos(cfg, spec, export)
    for name in sorted(set(infos) ^ set(headers)):
        raise ConfigError(f"{path}: {shown(name)} is {'missing' if name in infos else 'not part of the model'}.")
    types = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    for name, info in infos.items():
        if headers[name] != (types[info.dtype], info.shape):
            raise ConfigError(f"{path}: {name} is {headers[name]}, config.json asks for {info.shape} {info.dtype}.")
