"""Which models a format can hold, answered from the configuration before anything is trained."""

from collections.abc import Callable
from importlib.util import find_spec

from bitnet_train.errors import ConfigError, did_you_mean
from bitnet_train.export.config import ExportConfig, LinearClass
from bitnet_train.export.gguf.plan import Container, gguf_obstacle
from bitnet_train.export.limits import foreign_family, foreign_inputs, wide_codes
from bitnet_train.nn.config import DecoderConfig, Norms
from bitnet_train.nn.layout import parameter_table, quantised_layers
from bitnet_train.quant.spec import CODES_PER_BYTE, QuantSpec

Rule = Callable[[DecoderConfig, QuantSpec, ExportConfig], str | None]


def hf_packed_obstacle(cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig) -> str | None:
    """Why transformers' packed format cannot hold the model, or None when it can."""
    if found := foreign_family(cfg) or wide_codes(cfg, spec):
        return found
    shapes = {p.layer_name: p.shape for p in parameter_table(cfg)}
    for name in quantised_layers(cfg, spec):
        if shapes[name][0] % CODES_PER_BYTE:
            return f"it packs {CODES_PER_BYTE} output rows into a byte, and {name} has {shapes[name][0]}"
    if cfg.attention_bias and export.linear_class is LinearClass.autobitlinear:
        return "its autobitlinear multiplies biases by the weight's scale (model.attention_bias; use bitlinear)"
    return _transformers_obstacle(cfg, spec)


def hf_master_obstacle(cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig) -> str | None:
    """Why transformers cannot ternarise the master weights as this run does, or None when it can."""
    for name, layer in quantised_layers(cfg, spec).items():
        if layer.scheme != "ternary" or layer.threshold != 0.5:
            return f"its consumer ternarises at half the scale, and {name} is {layer.scheme} at {layer.threshold}"
        if layer.trainable_scale or layer.statistic != "absmean":
            how = "learned" if layer.trainable_scale else "the median"
            return f"its consumer takes the mean magnitude for the scale, and that of {name} is {how}"
    return foreign_family(cfg) or _transformers_obstacle(cfg, spec)


def _transformers_obstacle(cfg: DecoderConfig, spec: QuantSpec) -> str | None:
    layers = quantised_layers(cfg, spec)
    if not layers:
        return "no layer is quantised"
    family = _family_obstacle(cfg)
    if family is not None:
        return family
    shapes = {p.layer_name: p.shape for p in parameter_table(cfg)}
    for name, layer in layers.items():
        groups = layer.group_count(shapes[name][0])
        if groups != 1:
            return f"it holds one scale per tensor, and {name} has {groups} (quant.weight.groups)"
        if layer.activation_bits is None:
            return f"its consumer quantises activations, and the inputs of {name} are floats (quant.activation.bits)"
        if found := foreign_inputs(name, layer):
            return found
    return None


def _family_obstacle(cfg: DecoderConfig) -> str | None:
    """Why no architecture of transformers that is written here has this decoder's parts, or None when one has."""
    if cfg.norms is Norms.pre_sub:
        for key, default in (("attention_bias", False), ("qk_norm", False), ("head_width", None)):
            if getattr(cfg, key) != default:
                return f"its BitNet architecture has sub-norms and not model.{key}={getattr(cfg, key)} as well"
    if cfg.attention_bias and cfg.qk_norm:
        return "its llama has model.attention_bias, its Qwen3 model.qk_norm, and none has both"
    return None


def hf_dense_obstacle(cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig) -> str | None:
    """Why dense weights cannot stand for the model, or None when they can."""
    for name, layer in quantised_layers(cfg, spec).items():
        if layer.hadamard:
            return f"its consumer does not rotate the inputs of {name} (quant.activation.hadamard)"
        if layer.top_k < 1:
            return f"its consumer does not leave out the smaller inputs of {name} (quant.activation.top_k)"
    return foreign_family(cfg) or _family_obstacle(cfg)


def packed_obstacle(cfg: DecoderConfig, spec: QuantSpec, export: ExportConfig) -> str | None:
    """Why the packed format cannot hold the model, or None when it can."""
    for name, layer in quantised_layers(cfg, spec).items():
        if layer.activation_bits is not None and (found := foreign_inputs(name, layer)):
            return found
    return wide_codes(cfg, spec)


def _gguf_rule(container: Container) -> Rule:
    return lambda cfg, spec, export: gguf_obstacle(cfg, spec, container, export)


# Add a format: its rule here, its writer in bitnet_train.export.writers.
FORMAT_RULES: dict[str, Rule] = {
    "hf-packed": hf_packed_obstacle,
    "hf-master": hf_master_obstacle,
    "hf-dense": hf_dense_obstacle,
    "packed": packed_obstacle,
    **{container.value: _gguf_rule(container) for container in Container},
}

TRANSFORMERS = {"transformers": "export", "accelerate": "export"}
GGUF = {"gguf": "export"}
# The packages that writing and verifying a format take, and the extra that brings each.
PACKAGES: dict[str, dict[str, str]] = {
    "hf-packed": TRANSFORMERS,
    "hf-master": TRANSFORMERS,
    "hf-dense": TRANSFORMERS,
    "packed": {},
    "gguf-tq2_0": {**GGUF, "llama_cpp": "llama-cpp"},
    "gguf-tq1_0": {**GGUF, "llama_cpp": "llama-cpp"},
    "gguf-i2_s": GGUF,
}


def missing_packages(name: str) -> str | None:
    """The clause about packages that format ``name`` needs and this environment lacks, or None."""
    missing = {package: extra for package, extra in PACKAGES[name].items() if find_spec(package) is None}
    if not missing:
        return None
    packages = " and ".join(package.replace("_", "-") for package in missing)
    extras = ",".join(sorted(set(missing.values())))
    return f'it is verified with {packages}, not installed here: pip install "bitnet-train[{extras}]"'


def check_formats(cfg: ExportConfig, model: DecoderConfig, spec: QuantSpec) -> None:
    """Raises ConfigError when a format that the configuration names is unknown or cannot hold the model."""
    if cfg.verify_tokens < 2:
        raise ConfigError(f"export.verify_tokens is {cfg.verify_tokens}; it must be at least 2.")
    for name in cfg.formats or []:
        if name not in FORMAT_RULES:
            near = did_you_mean(name, FORMAT_RULES)
            raise ConfigError(f"export.formats: '{name}' does not exist; choose from {', '.join(FORMAT_RULES)}.{near}")
        obstacle = FORMAT_RULES[name](model, spec, cfg)
        if obstacle:
            others = [n for n, rule in FORMAT_RULES.items() if rule(model, spec, cfg) is None]
            raise ConfigError(
                f"export.formats: {name} cannot hold this model: {obstacle}; formats that can: "
                f"{', '.join(others) or 'none'}."
            )


def fitting_formats(cfg: ExportConfig, model: DecoderConfig, spec: QuantSpec) -> tuple[list[str], dict[str, str]]:
    """The formats to write, and for those left out by ``formats=null`` the reason.

    Raises ConfigError for a named format that is unknown, cannot hold the model, or cannot be verified here.
    """
    if cfg.formats is not None:
        check_formats(cfg, model, spec)
        for name in cfg.formats:
            missing = missing_packages(name)
            if missing:
                raise ConfigError(f"export.formats: {name}: {missing}.")
        return list(cfg.formats), {}
    reasons = {name: rule(model, spec, cfg) or missing_packages(name) for name, rule in FORMAT_RULES.items()}
    return [n for n, r in reasons.items() if r is None], {n: r for n, r in reasons.items() if r is not None}


def no_export(cfg: ExportConfig, model: DecoderConfig, spec: QuantSpec) -> str | None:
    """One sentence when no format can hold what a run trains, with the reasons of the two that hold most; or None."""
    reasons = {name: rule(model, spec, cfg) for name, rule in FORMAT_RULES.items()}
    if any(reason is None for reason in reasons.values()):
        return None
    why = "; ".join(f"{name}: {reasons[name]}" for name in ("packed", "hf-dense"))
    return f"no export format can hold this model ({why})"
