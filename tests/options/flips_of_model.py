"""Flips of ``seed``, ``model``, ``quant``, ``kernels`` and ``init``."""

from tests.options.flip import Flip, each, items

LONG = ("trainer.max_steps=8", "trainer.validate_every=8")
MLP, VIT = ("+recipe=digits_mlp",), ("+recipe=digits_vit",)
FOLLOWS_THE_DATA = {"image_size": "16", "channels": "3", "classes": "12"}

FLIPS: dict[str, Flip] = {
    "seed": Flip("seed=2"),
    **each(
        {
            "hidden": "48", "layers": "3", "heads": "4", "kv_heads": "1", "head_width": "8", "ffn": "96",
            "vocab": "330", "activation": "silu", "attention_bias": "true", "qk_norm": "true",
            "tie_embeddings": "false", "rope_theta": "100", "norm_eps": "0.1", "residual_dtype": "bfloat16",
        },
        under="model=decoder.",
    ),
    "model=decoder.norms": Flip("model.norms=pre", ("init.sub_norm_gain=1",)),
    "model=decoder.context": Flip("model.context=64", see="buffers"),
    **each({"hidden": "96", "layers": "5", "quantise_ends": "true", "norm_eps": "0.1", "activation": "gelu",
            "norm": "false"}, *MLP, under="model=mlp."),
    **each({"hidden": "96", "layers": "2", "quantise_ends": "true", "norm_eps": "0.1", "activation": "relu",
            "norms": "pre", "patch": "4", "heads": "2", "ffn": "96"}, *VIT, "init.sub_norm_gain=1", under="model=vit."),
    **{f"model=mlp.{name}": Flip(f"model.{name}={v}", MLP, refused=True) for name, v in FOLLOWS_THE_DATA.items()},
    **{f"model=vit.{name}": Flip(f"model.{name}={v}", VIT, refused=True) for name, v in FOLLOWS_THE_DATA.items()},
    **each({"scheme": "binary", "statistic": "absmedian", "threshold": "0.7", "groups": "row", "group_rows": "8",
            "trainable_scale": "true"}, under="quant.weight."),
    **each({"bits": "3"}, "quant.weight.scheme=symmetric", "quant.weight.bits=4", under="quant.weight."),
    **each({"bits": "4", "statistic": "absmean", "granularity": "tensor", "top_k": "0.5", "hadamard": "true"},
           under="quant.activation."),
    **each({"group_size": "8"}, "quant.activation.granularity=group", "quant.activation.group_size=16",
           under="quant.activation."),
    **each({"dx": "int8", "dw": "int8"}, under="quant.gradient."),
    **items(
        {
            "pattern": "[{pattern: layers.1.*, scheme: binary}]",
            "scheme": "[{pattern: layers.0.*, scheme: float}]",
            "statistic": "[{pattern: layers.0.*, scheme: binary, statistic: absmedian}]",
            "groups": "[{pattern: layers.0.*, scheme: binary, groups: 4}]",
            "group_rows": "[{pattern: layers.0.*, scheme: binary, group_rows: 8}]",
            "trainable_scale": "[{pattern: layers.0.*, scheme: binary, trainable_scale: true}]",
            "activation_bits": "[{pattern: layers.0.*, scheme: binary, activation_bits: 4}]",
            "activation_statistic": "[{pattern: layers.0.*, scheme: binary, activation_statistic: absmean}]",
            "activation_granularity": "[{pattern: layers.0.*, scheme: binary, activation_granularity: tensor}]",
            "top_k": "[{pattern: layers.0.*, scheme: binary, top_k: 0.5}]",
            "hadamard": "[{pattern: layers.0.*, scheme: binary, hadamard: true}]",
        },
        "[{pattern: layers.0.*, scheme: binary}]", under="quant.overrides",
    ),
    **items({"threshold": "[{pattern: '*', threshold: 0.7}]"}, "[]", under="quant.overrides"),
    **items({"bits": "[{pattern: '*o_proj', scheme: symmetric, bits: 3}]"},
            "[{pattern: '*o_proj', scheme: symmetric, bits: 4}]", under="quant.overrides"),
    **items({"activation_group_size": "[{pattern: '*', activation_granularity: group, activation_group_size: 8}]"},
            "[{pattern: '*', activation_granularity: group, activation_group_size: 16}]", under="quant.overrides"),
    **items({"since": "[{pattern: '*', activation_bits: 4, since: 2}]"},
            "[{pattern: '*', activation_bits: 4, since: 3}]", under="quant.overrides"),
    **each({"until": "3", "shape": "cosine"}, *LONG, "quant/progressive=lambda", "quant.progressive.until=5",
           under="quant.progressive=lambda."),
    **each({"at": "3"}, "quant/progressive=switch", "quant.progressive.at=2", under="quant.progressive=switch."),
    **each({"until": "3", "order": "last_to_first"}, "quant/progressive=layerwise", "quant.progressive.until=2",
           under="quant.progressive=layerwise."),
    **items({"bits": "[{bits: 4, until: 2}]", "until": "[{bits: 8, until: 3}]"}, "[{bits: 8, until: 2}]",
            "quant/progressive=bits", under="quant.progressive=bits.stages"),
    **each({"rate": "0.9", "until": "2"}, *LONG, "quant/progressive=noise", "quant.progressive.until=6",
           under="quant.progressive=noise."),
    "kernels.backend": Flip("kernels.backend=cpu", see="provenance"),
}  # fmt: skip

for init in ("normal", "depth_scaled", "fan_in", "small", "mitchell"):
    name, on = f"init={init}.", (f"init={init}",)
    FLIPS |= items(
        {"pattern": "[{pattern: '*q_proj', std: 0.5}]", "std": "[{pattern: embed_tokens, std: 0.3}]"},
        "[{pattern: embed_tokens, std: 0.5}]", *on, under=f"{name}overrides",
    )  # fmt: skip
    FLIPS |= items({"factor": "[{pattern: embed_tokens, factor: 3}]"}, "[{pattern: embed_tokens, factor: 2}]", *on,
                   under=f"{name}overrides")  # fmt: skip
    FLIPS |= each({"sub_norm_gain": "0.5", "from": "@run@"}, *on, "init.sub_norm_gain=1", under=name)
    FLIPS[f"{name}sub_norms"] = Flip(
        "init.sub_norms=ones", (*on, "init.sub_norm_gain=1", "model.activation=silu", "init.from=@llama@")
    )
    if init in ("normal", "depth_scaled"):
        FLIPS |= each({"std": "0.2", "embedding_std": "0.2"}, *on, under=name)
    if init == "fan_in":
        FLIPS |= each({"gain": "0.5", "embedding_std": "0.2"}, *on, under=name)
