"""Names and shapes of every parameter of a model, as plain arithmetic.

What a recipe costs, which layers an override meets and which formats a model fits can be answered from here without
torch and without allocating a weight. A test holds it equal to the real module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import DecoderConfig, InitConfig, ModelConfig, Norms
from bitnet_train.nn.vision.config import MlpConfig, VitConfig
from bitnet_train.quant.spec import LayerQuant, QuantSpec


class Role(Enum):
    """What a parameter is for; decides weight decay, initialisation and quantisation (scale: a learned one)."""

    embedding = "embedding"
    head = "head"
    norm = "norm"
    linear = "linear"
    bias = "bias"
    scale = "scale"


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter: its name in the state dict, shape and role."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def layer_name(self) -> str:
        """The module whose matrix or gain the parameter is; a bias, which stays a float, stands for itself."""
        return self.name if self.role is Role.bias else self.name.rpartition(".")[0]


def block_linears(cfg: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: name inside the block -> (out, in)."""
    kv = cfg.kv_heads * cfg.head_dim
    return {
        "self_attn.q_proj": (cfg.attention_width, cfg.hidden),
        "self_attn.k_proj": (kv, cfg.hidden),
        "self_attn.v_proj": (kv, cfg.hidden),
        "self_attn.o_proj": (cfg.hidden, cfg.attention_width),
        "mlp.gate_proj": (cfg.ffn, cfg.hidden),
        "mlp.up_proj": (cfg.ffn, cfg.hidden),
        "mlp.down_proj": (cfg.hidden, cfg.ffn),
    }


def biased_linears(cfg: DecoderConfig) -> tuple[str, ...]:
    """The linear layers of a block that have a bias, by their names inside the block."""
    return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if cfg.attention_bias else ()


def block_norms(cfg: DecoderConfig) -> dict[str, int]:
    """The RMSNorms of one block: name inside the block -> width."""
    if cfg.norms is Norms.inside:
        return {f"{name}_norm": shape[1] for name, shape in block_linears(cfg).items()}
    norms = {"input_layernorm": cfg.hidden, "post_attention_layernorm": cfg.hidden}
    if cfg.norms is Norms.pre_sub:
        norms |= {"self_attn.attn_sub_norm": cfg.attention_width, "mlp.ffn_sub_norm": cfg.ffn}
    if cfg.qk_norm:
        norms |= {"self_attn.q_norm": cfg.head_dim, "self_attn.k_norm": cfg.head_dim}
    return norms


def _decoder_table(cfg: DecoderConfig) -> list[ParameterInfo]:
    table = [ParameterInfo("embed_tokens.weight", (cfg.vocab, cfg.hidden), Role.embedding)]
    for layer in range(cfg.layers):
        for name, shape in block_linears(cfg).items():
            table.append(ParameterInfo(f"layers.{layer}.{name}.weight", shape, Role.linear))
            if name in biased_linears(cfg):
                table.append(ParameterInfo(f"layers.{layer}.{name}.bias", shape[:1], Role.bias))
        for name, width in block_norms(cfg).items():
            table.append(ParameterInfo(f"layers.{layer}.{name}.weight", (width,), Role.norm))
    table.append(ParameterInfo("norm.weight", (cfg.hidden,), Role.norm))
    if not cfg.tie_embeddings:
        table.append(ParameterInfo("lm_head.weight", (cfg.vocab, cfg.hidden), Role.head))
    return table


def mlp_linears(cfg: MlpConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of an MLP, first and last included: name -> (out, in)."""
    inner = {f"layers.{i}.proj": (cfg.hidden, cfg.hidden) for i in range(cfg.layers - 2)}
    return {"input_proj": (cfg.hidden, cfg.pixels), **inner, "head": (cfg.classes, cfg.hidden)}


def _mlp_table(cfg: MlpConfig) -> list[ParameterInfo]:
    table = []
    for name, shape in mlp_linears(cfg).items():
        table.append(ParameterInfo(f"{name}.weight", shape, _end_role(name, cfg.quantise_ends)))
        if cfg.norm and name != "input_proj":
            # The norm before the layer, beside it; the head's is called as a decoder's last one.
            norm = "norm" if name == "head" else name.replace("proj", "norm")
            table.append(ParameterInfo(f"{norm}.weight", (cfg.hidden,), Role.norm))
    return table


def vit_block_linears(cfg: VitConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of one block of a vision transformer: name inside the block -> (out, in)."""
    square = {f"self_attn.{name}_proj": (cfg.hidden, cfg.hidden) for name in "qkvo"}
    return {**square, "mlp.up_proj": (cfg.ffn, cfg.hidden), "mlp.down_proj": (cfg.hidden, cfg.ffn)}


def _vit_table(cfg: VitConfig) -> list[ParameterInfo]:
    norms = {"input_layernorm": cfg.hidden, "post_attention_layernorm": cfg.hidden}
    if cfg.norms is Norms.pre_sub:
        norms |= {"self_attn.attn_sub_norm": cfg.hidden, "mlp.ffn_sub_norm": cfg.ffn}
    role = _end_role("patch_embed", cfg.quantise_ends)
    table = [
        ParameterInfo("patch_embed.weight", (cfg.hidden, cfg.patch_pixels), role),
        ParameterInfo("positions.weight", (cfg.tokens, cfg.hidden), Role.embedding),
    ]
    for layer in range(cfg.layers):
        for name, shape in vit_block_linears(cfg).items():
            table.append(ParameterInfo(f"layers.{layer}.{name}.weight", shape, Role.linear))
        table += [ParameterInfo(f"layers.{layer}.{name}.weight", (width,), Role.norm) for name, width in norms.items()]
    table.append(ParameterInfo("norm.weight", (cfg.hidden,), Role.norm))
    table.append(ParameterInfo("head.weight", (cfg.classes, cfg.hidden), _end_role("head", cfg.quantise_ends)))
    return table


def _end_role(name: str, quantised: bool) -> Role:
    """The role of a classifier's layer: the first and the last are embedding and head unless they are quantised."""
    ends = {"input_proj": Role.embedding, "patch_embed": Role.embedding, "head": Role.head}
    return Role.linear if quantised else ends.get(name, Role.linear)


TABLES: dict[type[ModelConfig], Callable[..., list[ParameterInfo]]] = {
    DecoderConfig: _decoder_table,
    MlpConfig: _mlp_table,
    VitConfig: _vit_table,
}


def parameter_table(cfg: ModelConfig) -> list[ParameterInfo]:
    """Every parameter of the model in a fixed order; a tied head is not listed twice."""
    return TABLES[type(cfg)](cfg)


def block_count(cfg: ModelConfig) -> int:
    """How many blocks ``layers.N`` the model has; at least 1, also for an MLP without any layer between its ends."""
    if isinstance(cfg, MlpConfig):
        return max(1, cfg.layers - 2)
    assert isinstance(cfg, DecoderConfig | VitConfig)
    return cfg.layers


def quantised_layers(cfg: ModelConfig, spec: QuantSpec) -> dict[str, LayerQuant]:
    """Module name -> quantisation of every linear layer of the blocks that the spec quantises."""
    names = [p.layer_name for p in parameter_table(cfg) if p.role is Role.linear]
    return {name: layer for name in names if (layer := spec.for_layer(name)).quantised}


def check_spec(cfg: ModelConfig, spec: QuantSpec) -> None:
    """Raises ConfigError when an override matches no layer or groups do not divide a layer's rows."""
    linears = {p.layer_name: p.shape for p in parameter_table(cfg) if p.role is Role.linear}
    for pattern in spec.unmatched(linears):
        raise ConfigError(
            f"quant.overrides: the pattern '{pattern}' matches no linear layer; names look like "
            f"'{_example(list(linears))}'."
        )
    quantised = quantised_layers(cfg, spec)
    for change in spec.late:
        if not any(fnmatchcase(name, change.pattern) for name in quantised):
            raise ConfigError(
                f"quant.overrides: '{change.pattern}' since {change.since:g} matches no quantised layer: float layers "
                "do not quantise their inputs."
            )
    for name, layer in quantised.items():
        try:
            layer.group_count(linears[name][0])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        layer.inputs.check_width(name, linears[name][1])


def _example(names: list[str]) -> str:
    return next((name for name in ("layers.0.self_attn.o_proj", "layers.0.proj") if name in names), names[0])


def learned_scales(cfg: ModelConfig, spec: QuantSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of the learned scale of every layer that has one."""
    linears = {p.layer_name: p.shape for p in parameter_table(cfg)}
    return {
        f"{name}.weight_scale": (layer.group_count(linears[name][0]),)
        for name, layer in quantised_layers(cfg, spec).items()
        if layer.trainable_scale
    }


def trained_parameters(cfg: ModelConfig, spec: QuantSpec) -> list[ParameterInfo]:
    """Every parameter that the optimizer has: the model's, and the learned scales."""
    scales = [ParameterInfo(name, shape, Role.scale) for name, shape in learned_scales(cfg, spec).items()]
    return [*parameter_table(cfg), *scales]


def check_init_overrides(cfg: ModelConfig, init: InitConfig) -> None:
    """Raises ConfigError when a pattern of ``init.overrides`` matches no weight matrix."""
    matrices = [p.layer_name for p in parameter_table(cfg) if len(p.shape) > 1]
    for override in init.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in matrices):
            raise ConfigError(
                f"init.overrides: the pattern '{override.pattern}' matches no weight matrix; names look like "
                f"'{_example(matrices)}' and '{matrices[0]}'{tied_head(cfg)}."
            )


def tied_head(cfg: ModelConfig) -> str:
    """The clause that explains why 'lm_head' does not exist, where it does not."""
    return " (with model.tie_embeddings the head is embed_tokens)" if getattr(cfg, "tie_embeddings", False) else ""
