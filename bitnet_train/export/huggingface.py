"""The writer of format ``hf-packed``: a folder that ``transformers`` loads as BitNetForCausalLM or LlamaForCausalLM.

Codes are packed four to a byte, ``weight_scale`` is direct (``linear_class: autobitlinear`` multiplies by it), and
every field of config.json is written out, so that no default of a library version decides what the model computes.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.config import ExportDtype
from bitnet_train.export.tensor_file import TensorFileWriter, TensorInfo
from bitnet_train.nn.config import DecoderConfig, Norms
from bitnet_train.nn.layout import Role, parameter_table, quantised_layers
from bitnet_train.quant.packing import pack_2bit
from bitnet_train.quant.spec import CODES_PER_BYTE, QuantSpec

WEIGHTS = "model.safetensors"
# Key of the safetensors metadata that says which step of the run the file was made from.
STEP_KEY = "bitnet_train_step"


@dataclass(frozen=True)
class ExportSize:
    """What an export takes: bytes in all, of codes with their scales, of embedding and head; and how many codes."""

    total_bytes: int
    code_bytes: int
    embedding_bytes: int
    code_weights: int

    @property
    def bits_per_code(self) -> float:
        """Bits of storage per quantised weight, scales included."""
        return 8 * self.code_bytes / max(1, self.code_weights)


def hf_name(name: str) -> str:
    """The name ``transformers`` gives to a parameter or module of our Decoder."""
    return name if name.startswith("lm_head") else f"model.{name}"


def model_config(cfg: DecoderConfig, spec: QuantSpec, bos_id: int, eos_id: int, dtype: ExportDtype) -> dict[str, Any]:
    """config.json, every field that the architecture reads."""
    llama = cfg.norms is Norms.pre
    quantised = quantised_layers(cfg, spec)
    linears = [p.layer_name for p in parameter_table(cfg) if p.role is Role.linear]
    return {
        "architectures": ["LlamaForCausalLM" if llama else "BitNetForCausalLM"],
        "model_type": "llama" if llama else "bitnet",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": cfg.activation.value,
        "max_position_embeddings": cfg.context,
        "rms_norm_eps": cfg.norm_eps,
        # transformers 5 reads rope_parameters, version 4 and other loaders rope_theta.
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False, "pretraining_tp": 1} if llama else {}),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype.value,
        "torch_dtype": dtype.value,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "use_rms_norm": False,
            "rms_norm_eps": cfg.norm_eps,
            "modules_to_not_convert": ["lm_head", *(hf_name(name) for name in linears if name not in quantised)],
        },
    }


def generation_config(cfg: DecoderConfig, bos_id: int, eos_id: int) -> dict[str, Any]:
    """generation_config.json: plain sampling as ``command=generate`` does it, up to the context's end."""
    return {
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "max_length": cfg.context,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 1.0,
    }


def tensor_infos(cfg: DecoderConfig, spec: QuantSpec, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Name -> type and shape of every tensor of model.safetensors; ``dtype`` is that of all but the packed codes."""
    infos: dict[str, TensorInfo] = {}
    quantised = quantised_layers(cfg, spec)
    for parameter in parameter_table(cfg):
        if parameter.layer_name in quantised:
            rows, columns = parameter.shape
            infos[hf_name(parameter.name)] = TensorInfo(torch.uint8, (rows // CODES_PER_BYTE, columns))
            infos[f"{hf_name(parameter.name)}_scale"] = TensorInfo(dtype, (1,))
        else:
            infos[hf_name(parameter.name)] = TensorInfo(dtype, parameter.shape)
    return infos


def export_size(cfg: DecoderConfig, spec: QuantSpec, dtype: ExportDtype) -> ExportSize:
    """The sizes of an export's tensors, from the configuration alone."""
    infos = tensor_infos(cfg, spec, getattr(torch, dtype.value))
    scales = {name for name in infos if name.endswith("_scale")}
    codes = scales | {name.removesuffix("_scale") for name in scales}
    embedding = {"model.embed_tokens.weight", "lm_head.weight"}
    return ExportSize(
        total_bytes=sum(info.bytes for info in infos.values()),
        code_bytes=sum(infos[name].bytes for name in codes),
        embedding_bytes=sum(info.bytes for name, info in infos.items() if name in embedding),
        code_weights=sum(CODES_PER_BYTE * infos[name].bytes for name in codes - scales),
    )


def write_huggingface(
    canonical: CanonicalCheckpoint, tokenizer: TextTokenizer, folder: Path, dtype: ExportDtype
) -> None:
    """Write the export to ``folder``, replacing an older one in a rename: it appears whole or not at all.

    Raises ConfigError when a weight is not finite or the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        cfg, spec = canonical.cfg, canonical.spec
        _write_weights(canonical, partial / WEIGHTS, getattr(torch, dtype.value))
        _write_json(partial / "config.json", model_config(cfg, spec, tokenizer.bos_id, tokenizer.eos_id, dtype))
        _write_json(partial / "generation_config.json", generation_config(cfg, tokenizer.bos_id, tokenizer.eos_id))
        write_tokenizer(tokenizer, partial, cfg.context)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(f"The export {folder} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_weights(canonical: CanonicalCheckpoint, path: Path, dtype: torch.dtype) -> None:
    infos = tensor_infos(canonical.cfg, canonical.spec, dtype)
    with TensorFileWriter(path, infos, {STEP_KEY: str(canonical.step)}) as file:
        for name in canonical.tensor_names:
            file.write(hf_name(name), canonical.tensor(name).to(dtype))
        for layer in canonical.quantised:
            codes = canonical.codes(layer)
            file.write(hf_name(f"{layer}.weight"), pack_2bit(codes.codes))
            file.write(hf_name(f"{layer}.weight_scale"), codes.scale.to(dtype))


def write_tokenizer(tokenizer: TextTokenizer, folder: Path, context: int) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, which AutoTokenizer reads.

    Text becomes the run's own ids. A consumer that asks for special tokens (the default of ``tokenizer(text)``) gets
    the bos id in front, which is how every training document starts.
    """
    exported = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    exported.no_padding()
    exported.no_truncation()
    bos, eos = (exported.id_to_token(index) for index in (tokenizer.bos_id, tokenizer.eos_id))
    exported.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
            ),
        ]
    )
    exported.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "added_tokens_decoder": {
                str(index): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for index, token in sorted(exported.get_added_tokens_decoder().items())
            },
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
