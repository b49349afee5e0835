"""Reading a ``transformers`` folder into our own Decoder, or as the start of a run: codes stay what they are.

The folder may come from anywhere, so sizes are held against the file's own header before anything is allocated, and
whatever is wrong ends in one sentence.
"""

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_train.data.tokenizer import TextTokenizer, one_special_id, read_chat_template
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import LONGEST_CONTEXT, assemble_decoder
from bitnet_train.export.folder import panics_as_errors, read_json, shown, unreadable
from bitnet_train.export.huggingface.model_config import hf_name, zero_biases
from bitnet_train.export.huggingface.variant import Storage, Variant
from bitnet_train.export.huggingface.writer import WEIGHTS, direct_scale, tensor_infos
from bitnet_train.export.tensor_file import TensorInfo
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.config import Activation, DecoderConfig, Norms, check_decoder
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.layout import Role, parameter_table, quantised_layers
from bitnet_train.quant.packing import unpack_2bit
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes, quantise_weight

TOKENIZER_BYTES = 256 << 20
# A float of any magnitude holds smaller integers.
LARGEST_INTEGER = 1 << 1000
# More modules than any model lists; each is compared with each layer.
MOST_SKIPPED = 10_000
FAMILIES = {"bitnet": Norms.pre_sub, "llama": Norms.pre, "qwen2": Norms.pre, "qwen3": Norms.pre}
FLOAT_TYPES = {"F32", "BF16", "F16"}


def is_transformers_folder(folder: Path) -> bool:
    """Whether the folder looks like one: it has a config.json or weights."""
    return (folder / "config.json").is_file() or (folder / WEIGHTS).is_file()


@dataclass(frozen=True)
class ImportedModel:
    """What a ``transformers`` folder holds: shape, quantisation, codes of packed layers, all else in float32."""

    cfg: DecoderConfig
    spec: QuantSpec
    storage: Storage
    codes: dict[str, Codes]
    tensors: dict[str, Tensor]

    def decoder(self, backend: Backend | None = None) -> Decoder:
        """A float32 Decoder in eval mode that computes what the folder's consumer computes."""
        codes = self.codes
        if self.storage is Storage.master:
            layers = quantised_layers(self.cfg, self.spec)
            codes = {name: quantise_weight(self.tensors[f"{name}.weight"], quant) for name, quant in layers.items()}
        return assemble_decoder(self.cfg, self.spec, codes, self.tensors, backend)


def load_export(
    folder: Path, device: torch.device | str = "cpu", backend: Backend | None = None
) -> tuple[Decoder, TextTokenizer]:
    """The model (float32, eval mode, without master weights) and the tokenizer of an ``hf-*`` export.

    Raises ConfigError for a folder that is incomplete, damaged, or of a kind that is not read here.
    """
    imported = read_model(folder, device)
    return imported.decoder(backend), read_tokenizer(folder)


def read_model(folder: Path, device: torch.device | str = "cpu") -> ImportedModel:
    """The tensors of a BitNet or llama checkpoint of ``transformers``: packed in either convention, master or dense.

    Raises ConfigError for a folder that is incomplete, damaged, or of a kind that is not read here.
    """
    config = read_json(folder / "config.json")
    cfg, spec, variant = _decoder_config(config, folder)
    codes, tensors = _read_tensors(folder, cfg, spec, variant, torch.device(device))
    layers = [p.layer_name for p in parameter_table(cfg) if p.role is Role.linear]
    floats = tuple((name, FLOAT) for name in layers if not spec.for_layer(name).quantised)
    return ImportedModel(cfg, replace(spec, overrides=floats), variant.storage, codes, tensors)


def _field(config: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < LARGEST_INTEGER else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: {key} is {short_repr(value)}, which is not of type {kind.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {key} is {value}, which is not a finite number.")
    return value


def _decoder_config(config: dict[str, Any], folder: Path) -> tuple[DecoderConfig, QuantSpec, Variant]:
    path = folder / "config.json"
    family, activation = _field(config, "model_type", str, path), _field(config, "hidden_act", str, path)
    if family not in FAMILIES:
        raise ConfigError(f"{path}: model_type is {short_repr(family)}; only {' and '.join(FAMILIES)} are read here.")
    if activation not in {a.value for a in Activation}:
        known = " and ".join(a.value for a in Activation)
        raise ConfigError(f"{path}: hidden_act is {short_repr(activation)}; only {known} are read here.")
    variant, spec = _quantisation(config, path)
    kinds = config.get("layer_types") or ["full_attention"]
    if config.get("use_sliding_window") or not isinstance(kinds, list) or {*map(str, kinds)} != {"full_attention"}:
        raise ConfigError(f"{path}: the model has sliding windows of attention, which are not read here.")
    if (config.get("attention_bias") and family != "llama") or config.get("mlp_bias"):
        raise ConfigError(f"{path}: the model has biases on o_proj or in the FFN, which the decoder here lacks.")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ConfigError(f"{path}: only plain rotary positions (rope_type default) are read here.")
    cfg = DecoderConfig(
        hidden=_field(config, "hidden_size", int, path),
        layers=_field(config, "num_hidden_layers", int, path),
        heads=_field(config, "num_attention_heads", int, path),
        kv_heads=_field(config, "num_key_value_heads", int, path),
        head_width=_head_width(config, path),
        attention_bias=family == "qwen2" or (family == "llama" and config.get("attention_bias") is True),
        qk_norm=family == "qwen3",
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
    if cfg.head_width is not None and family == "bitnet":
        raise ConfigError(
            f"{path}: head_dim is {cfg.head_width}; only hidden_size / num_attention_heads is read here for bitnet."
        )
    if cfg.context > LONGEST_CONTEXT:
        raise ConfigError(
            f"{path}: max_position_embeddings is {cfg.context:,}; {LONGEST_CONTEXT:,} is the most that is read here."
        )
    return cfg, spec, variant


def _head_width(config: dict[str, Any], path: Path) -> int | None:
    """head_dim where it is not hidden_size / num_attention_heads; Qwen3's default is 128."""
    value = config.get("head_dim", 128 if config.get("model_type") == "qwen3" else None)
    if value is None:
        return None
    width, heads = _field({"head_dim": value}, "head_dim", int, path), _field(config, "num_attention_heads", int, path)
    return None if width * heads == _field(config, "hidden_size", int, path) else width


def _quantisation(config: dict[str, Any], path: Path) -> tuple[Variant, QuantSpec]:
    """How the linear layers are stored, and which of them are quantised."""
    if config.get("quantization_config") is None:
        return Variant(Storage.dense, linear_class=None), QuantSpec(FLOAT)
    found = _field(config, "quantization_config", dict, path)
    # What transformers takes when a field is missing.
    read = {"quant_method": None, "linear_class": "bitlinear", "quantization_mode": "offline", "use_rms_norm": False}
    read |= {key: found[key] for key in read if key in found}
    allowed: dict[str, tuple[object, ...]] = {
        "quant_method": ("bitnet",),
        "linear_class": ("bitlinear", "autobitlinear"),
        "quantization_mode": ("offline", "online"),
        "use_rms_norm": (False,),
    }
    for key, values in allowed.items():
        if read[key] not in values:
            only = " and ".join(map(repr, values))
            raise ConfigError(
                f"{path}: quantization_config.{key} is {short_repr(read[key])}; only {only} is read here."
            )
    storage = Storage.master if read["quantization_mode"] == "online" else Storage.packed
    if storage is Storage.master and read["linear_class"] == "bitlinear":
        raise ConfigError(f"{path}: quantization_mode online needs linear_class autobitlinear, not bitlinear.")
    skipped = found.get("modules_to_not_convert") or []
    strings = isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
    if not strings or len(skipped) > MOST_SKIPPED:
        raise ConfigError(f"{path}: quantization_config.modules_to_not_convert is no list of module names.")
    floats = tuple((pattern, FLOAT) for name in skipped for pattern in _skipped_layers(name, path))
    return Variant(storage, linear_class=str(read["linear_class"])), QuantSpec(LayerQuant(), floats)


def _skipped_layers(name: str, path: Path) -> list[str]:
    """Patterns of our layers that transformers leaves dense for an entry of ``modules_to_not_convert``.

    Those are the module of that path with all below it, and modules whose path ends so. (Entries may be regular
    expressions there; such folders are refused.)
    """
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name) or name == "model":
        raise ConfigError(
            f"{path}: quantization_config.modules_to_not_convert has {short_repr(name)}, which is no module's name."
        )
    if not name.startswith("model."):
        return [f"*{name}"]
    ours = name.removeprefix("model.").rstrip(".")
    return [ours, f"{ours}.*"]


class _Tensors:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` lists."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.path = folder / WEIGHTS
        index = folder / f"{WEIGHTS}.index.json"
        files = [WEIGHTS]
        if not self.path.is_file() and index.is_file():
            placed = read_json(index).get("weight_map")
            names = list(placed.values()) if isinstance(placed, dict) else []
            plain = all(isinstance(name, str) and Path(name).name == name and name.isprintable() for name in names)
            if not names or not plain:
                raise ConfigError(f"{index} is damaged (its weight_map names no files of this folder).")
            self.path, files = index, sorted(set(names))
        self.files: dict[str, Any] = {}
        for name in files:
            try:
                opened = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(unreadable(folder / name, error)) from None
            self.files |= dict.fromkeys(opened.keys(), opened)

    def get(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        part = self.files[name].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()


def _read_tensors(
    folder: Path, cfg: DecoderConfig, spec: QuantSpec, variant: Variant, device: torch.device
) -> tuple[dict[str, Codes], dict[str, Tensor]]:
    codes: dict[str, Codes] = {}
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        file = _Tensors(folder, stack)
        try:
            # Before any table of that many layers is made from a damaged number.
            if cfg.layers > len(file.files):
                raise ConfigError(
                    f"{file.path} has {len(file.files)} tensors, too few for the {cfg.layers:,} blocks in config.json."
                )
            _check_header(file, cfg, spec, variant)
            packed = quantised_layers(cfg, spec) if variant.storage is Storage.packed else {}
            for name in packed:
                codes[name] = _read_codes(file, hf_name(name), variant, device)
            for name in _expected(file, cfg, spec, variant):
                ours = name.removeprefix("model.")
                owner, _, part = ours.rpartition(".")
                if owner not in packed or part == "bias":
                    tensor = file.get(name)
                    if not bool(torch.isfinite(tensor).all()):
                        raise ConfigError(f"{file.path}: {name} holds numbers that are not finite: it is damaged.")
                    if name in zero_biases(cfg):
                        if bool(tensor.any()):
                            raise ConfigError(
                                f"{file.path}: {name} is not zero, and the decoder here has no such bias."
                            )
                        continue
                    tensors[ours] = tensor.to(device, torch.float32)
        except (OSError, SafetensorError) as error:
            raise ConfigError(unreadable(file.path, error)) from None
    return codes, tensors


def _expected(file: _Tensors, cfg: DecoderConfig, spec: QuantSpec, variant: Variant) -> dict[str, TensorInfo]:
    """The tensors that belong in the file; biases of zero, which llama has and Qwen2 has not, all or none."""
    infos, zeros = tensor_infos(cfg, spec, variant), set(zero_biases(cfg))
    without = not zeros & set(file.files)
    return {name: info for name, info in infos.items() if not (without and name in zeros)}


def _check_header(file: _Tensors, cfg: DecoderConfig, spec: QuantSpec, variant: Variant) -> None:
    infos = _expected(file, cfg, spec, variant)
    # A tied head that is stored all the same is the embedding once more.
    spare = {"lm_head.weight"} if cfg.tie_embeddings else set()
    for name in sorted(set(infos) ^ (set(file.files) - spare)):
        raise ConfigError(
            f"{file.path}: {shown(name)} is {'missing' if name in infos else 'not part of the model in config.json'}."
        )
    for name, info in infos.items():
        shape, kind = file.header(name)
        if shape != info.shape:
            raise ConfigError(f"{file.path}: {name} has the shape {shape}, config.json asks for {info.shape}.")
        if (kind != "U8") if info.dtype is torch.uint8 else (kind not in FLOAT_TYPES):
            raise ConfigError(f"{file.path}: {name} is of type {kind}, which does not belong there.")


def _read_codes(file: _Tensors, name: str, variant: Variant, device: torch.device) -> Codes:
    try:
        codes = unpack_2bit(file.get(f"{name}.weight"))
    except ValueError as error:
        raise ConfigError(f"{file.path}: {name}: {error}.") from None
    stored = file.get(f"{name}.weight_scale")
    if not bool(torch.isfinite(stored).all() and (stored > 0).all()):
        raise ConfigError(f"{file.path}: {name}.weight_scale is {float(stored):g}; a scale is positive and finite.")
    return Codes(codes.to(device), direct_scale(stored, variant).to(device))


def read_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a ``transformers`` folder. Raises ConfigError when it is missing or does not fit the model."""
    path = folder / "tokenizer.json"
    config = read_json(folder / "config.json")
    vocab = _field(config, "vocab_size", int, folder / "config.json")
    read_json(path, TOKENIZER_BYTES)
    try:
        with panics_as_errors():
            tokenizer = Tokenizer.from_file(str(path))
        if not tokenizer.get_vocab_size():
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(unreadable(path, error)) from None
    bos = _field(config, "bos_token_id", int, folder / "config.json")
    eos = one_special_id(config.get("eos_token_id"))
    if eos is None or not all(0 <= index < vocab for index in (bos, eos)):
        raise ConfigError(
            f"{folder / 'config.json'}: bos_token_id={bos} and eos_token_id={config.get('eos_token_id')} must be ids "
            f"below {vocab}."
        )
    try:
        template = read_chat_template(folder)
    except RecursionError as error:
        raise ConfigError(unreadable(folder / "tokenizer_config.json", error)) from None
    text_tokenizer = TextTokenizer(tokenizer, bos, eos, template)
    if text_tokenizer.vocab_size > vocab:
        raise ConfigError(f"{path} has more ids than the model's vocabulary of {vocab}.")
    return text_tokenizer
