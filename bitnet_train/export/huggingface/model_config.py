"""config.json and generation_config.json of a ``transformers`` folder.

Every field is written out, so that no default of a library version decides what the model computes.
"""

from typing import Any

from bitnet_train.export.huggingface.variant import Storage, Variant
from bitnet_train.nn.config import DecoderConfig, Norms
from bitnet_train.nn.layout import Role, parameter_table, quantised_layers
from bitnet_train.quant.spec import QuantSpec


def hf_name(name: str) -> str:
    """The name ``transformers`` gives to a parameter or module of our Decoder."""
    return name if name.startswith("lm_head") else f"model.{name}"


ARCHITECTURES = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False, "pretraining_tp": 1},
    "qwen3": {"use_sliding_window": False},
}


def model_type(cfg: DecoderConfig) -> str:
    """What transformers calls a model of this kind.

    One with biases is a llama whose o_proj has a bias as well, of zeros: transformers would give a qwen2 the tokenizer
    of Qwen2 whatever the folder holds.
    """
    if cfg.norms is Norms.pre_sub:
        return "bitnet"
    return "qwen3" if cfg.qk_norm else "llama"


def zero_biases(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name in transformers -> shape of the biases that its llama has and our decoder has not: o_proj's, zeros."""
    layers = range(cfg.layers) if cfg.attention_bias and cfg.norms is Norms.pre else ()
    return {f"model.layers.{layer}.self_attn.o_proj.bias": (cfg.hidden,) for layer in layers}


def model_config(cfg: DecoderConfig, spec: QuantSpec, bos_id: int, eos_id: int, variant: Variant) -> dict[str, Any]:
    """config.json, every field that the architecture reads."""
    dtype, family = variant.dtype, model_type(cfg)
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
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
        "attention_bias": cfg.attention_bias,
        "attention_dropout": 0.0,
        **FAMILY_FIELDS.get(family, {}),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype.value,
        "torch_dtype": dtype.value,
        **({"quantization_config": _quantisation(cfg, spec, variant)} if variant.linear_class else {}),
    }


def _quantisation(cfg: DecoderConfig, spec: QuantSpec, variant: Variant) -> dict[str, Any]:
    quantised = quantised_layers(cfg, spec)
    linears = [p.layer_name for p in parameter_table(cfg) if p.role is Role.linear]
    return {
        "quant_method": "bitnet",
        "linear_class": variant.linear_class,
        "quantization_mode": "online" if variant.storage is Storage.master else "offline",
        "use_rms_norm": False,
        "rms_norm_eps": cfg.norm_eps,
        "modules_to_not_convert": ["lm_head", *(hf_name(name) for name in linears if name not in quantised)],
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
