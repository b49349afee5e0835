"""Reading an ``hf-packed`` export back into our own Decoder: the codes as they are, nothing is quantised again.

The folder may come from anywhere, so sizes are held against the file's own header before anything is allocated, and
whatever is wrong ends in one sentence.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import assemble_decoder
from bitnet_train.export.huggingface import WEIGHTS, hf_name, tensor_infos
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.config import Activation, DecoderConfig, Norms, check_decoder
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import quantised_layers
from bitnet_train.quant.packing import unpack_2bit
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes

CONFIG_BYTES = 16 << 20
TOKENIZER_BYTES = 256 << 20
# The rotary table is allocated from this number alone, so it gets a limit of its own.
LONGEST_CONTEXT = 1 << 24
FAMILIES = {"bitnet": Norms.pre_sub, "llama": Norms.pre}
FLOAT_TYPES = {"F32", "BF16", "F16"}


def is_export(folder: Path) -> bool:
    """Whether the folder looks like an export: it has a config.json or weights."""
    return (folder / "config.json").is_file() or (folder / WEIGHTS).is_file()


def load_export(
    folder: Path, device: torch.device | str = "cpu", backend: Backend | None = None
) -> tuple[Decoder, TextTokenizer]:
    """The model (float32, eval mode, codes without master weights) and the tokenizer of an export.

    Raises ConfigError for a folder that is incomplete, damaged, or of a kind that is not read here.
    """
    config = _read_json(folder / "config.json", CONFIG_BYTES)
    cfg, spec = _decoder_config(config, folder)
    codes, tensors = _read_tensors(folder / WEIGHTS, cfg, spec, torch.device(device))
    model = assemble_decoder(cfg, spec, codes, tensors, backend)
    return model, _read_tokenizer(folder, config, cfg)


def export_metadata(folder: Path) -> dict[str, str]:
    """The metadata in the header of model.safetensors. Raises ConfigError when the file is unreadable."""
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ConfigError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"{path} is missing: {path.parent} is no complete export; export again."
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} is damaged ({reason}): export again."


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > limit:
            raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, which no such file has: it is damaged.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(_unreadable(path, error)) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (it holds no object): export again.")
    return content


def _field(config: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: {key} is {value!r}, which is not of type {kind.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {key} is {value}, which is not a finite number.")
    return value


def _decoder_config(config: dict[str, Any], folder: Path) -> tuple[DecoderConfig, QuantSpec]:
    path = folder / "config.json"
    family, activation = _field(config, "model_type", str, path), _field(config, "hidden_act", str, path)
    if family not in FAMILIES:
        raise ConfigError(f"{path}: model_type is {family!r}; only {' and '.join(FAMILIES)} are read here.")
    if activation not in {a.value for a in Activation}:
        raise ConfigError(
            f"{path}: hidden_act is {activation!r}; only {' and '.join(a.value for a in Activation)} are read here."
        )
    quantisation = _field(config, "quantization_config", dict, path)
    wanted = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "use_rms_norm": False,
    }
    for key, value in wanted.items():
        if quantisation.get(key, False) != value:
            raise ConfigError(
                f"{path}: quantization_config.{key} is {quantisation.get(key)!r}; only {value!r} is read here."
            )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ConfigError(f"{path}: the model has biases, which are not read here.")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ConfigError(f"{path}: only plain rotary positions (rope_type default) are read here.")
    cfg = DecoderConfig(
        hidden=_field(config, "hidden_size", int, path),
        layers=_field(config, "num_hidden_layers", int, path),
        heads=_field(config, "num_attention_heads", int, path),
        kv_heads=_field(config, "num_key_value_heads", int, path),
        ffn=_field(config, "intermediate_size", int, path),
        context=_field(config, "max_position_embeddings", int, path),
        vocab=_field(config, "vocab_size", int, path),
        norms=FAMILIES[family],
        activation=Activation(activation),
        tie_embeddings=_field(config, "tie_word_embeddings", bool, path),
        rope_theta=_field(rope, "rope_theta", float, path),
        norm_eps=_field(config, "rms_norm_eps", float, path),
    )
    try:
        check_decoder(cfg)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if config.get("head_dim", cfg.head_dim) != cfg.head_dim:
        raise ConfigError(
            f"{path}: head_dim is {config['head_dim']!r}; only hidden_size / num_attention_heads is read here."
        )
    if cfg.context > LONGEST_CONTEXT:
        raise ConfigError(
            f"{path}: max_position_embeddings is {cfg.context:,}; {LONGEST_CONTEXT:,} is the most that is read here."
        )
    skipped = quantisation.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ConfigError(f"{path}: quantization_config.modules_to_not_convert is no list of module names.")
    floats = tuple((name.removeprefix("model."), FLOAT) for name in skipped if name.startswith("model.layers."))
    return cfg, QuantSpec(LayerQuant(), floats)


def _read_tensors(
    path: Path, cfg: DecoderConfig, spec: QuantSpec, device: torch.device
) -> tuple[dict[str, Codes], dict[str, Tensor]]:
    codes: dict[str, Codes] = {}
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            # Before any table of that many layers is made from a damaged number.
            if cfg.layers > len(names):
                raise ConfigError(
                    f"{path} has {len(names)} tensors, too few for the {cfg.layers:,} blocks in config.json."
                )
            _check_header(path, file, names, cfg, spec)
            layers = quantised_layers(cfg, spec)
            for name in layers:
                codes[name] = _read_codes(path, file, hf_name(name), device)
            for name in tensor_infos(cfg, spec, torch.float32):
                ours = name.removeprefix("model.")
                if ours.rpartition(".")[0] not in layers:
                    tensor = file.get_tensor(name)
                    if not bool(torch.isfinite(tensor).all()):
                        raise ConfigError(f"{path}: {name} holds numbers that are not finite: the file is damaged.")
                    tensors[ours] = tensor.to(device, torch.float32)
    except (OSError, SafetensorError) as error:
        raise ConfigError(_unreadable(path, error)) from None
    return codes, tensors


def _check_header(path: Path, file: Any, names: set[str], cfg: DecoderConfig, spec: QuantSpec) -> None:
    infos = tensor_infos(cfg, spec, torch.float32)
    for name in sorted(set(infos) ^ names):
        raise ConfigError(
            f"{path}: {name} is {'missing' if name in infos else 'not part of the model in config.json'}."
        )
    for name, info in infos.items():
        header = file.get_slice(name)
        shape, kind = tuple(header.get_shape()), header.get_dtype()
        if shape != info.shape:
            raise ConfigError(f"{path}: {name} has the shape {shape}, config.json asks for {info.shape}.")
        if (kind != "U8") if info.dtype is torch.uint8 else (kind not in FLOAT_TYPES):
            raise ConfigError(f"{path}: {name} is of type {kind}, which does not belong there.")


def _read_codes(path: Path, file: Any, name: str, device: torch.device) -> Codes:
    try:
        codes = unpack_2bit(file.get_tensor(f"{name}.weight"))
    except ValueError as error:
        raise ConfigError(f"{path}: {name}: {error}.") from None
    scale = file.get_tensor(f"{name}.weight_scale").float()
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ConfigError(f"{path}: {name}.weight_scale is {float(scale):g}; a scale is positive and finite.")
    return Codes(codes.to(device), scale.to(device))


def _read_tokenizer(folder: Path, config: dict[str, Any], cfg: DecoderConfig) -> TextTokenizer:
    path = folder / "tokenizer.json"
    _read_json(path, TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(_unreadable(path, error)) from None
    bos = _field(config, "bos_token_id", int, folder / "config.json")
    eos = config.get("eos_token_id")
    # Published models may list several ids that end a generation; the first is the tokenizer's.
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int) or not all(0 <= index < cfg.vocab for index in (bos, eos)):
        raise ConfigError(
            f"{folder / 'config.json'}: bos_token_id={bos} and eos_token_id={eos} must be ids below {cfg.vocab}."
        )
    text_tokenizer = TextTokenizer(tokenizer, bos, eos)
    if text_tokenizer.vocab_size > cfg.vocab:
        raise ConfigError(f"{path} has more ids than the model's vocabulary of {cfg.vocab}.")
    return text_tokenizer
