"""Which models a format can hold, answered from the configuration before anything is trained."""

from collections.abc import Callable

from bitnet_train.errors import ConfigError, did_you_mean
from bitnet_train.export.config import ExportConfig
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import parameter_table, quantised_layers
from bitnet_train.quant.spec import CODES_PER_BYTE, QuantSpec


def hf_packed_obstacle(cfg: DecoderConfig, spec: QuantSpec) -> str | None:
    """Why transformers' packed ``autobitlinear`` format cannot hold the model, or None when it can."""
    layers = quantised_layers(cfg, spec)
    if not layers:
        return "no layer is quantised"
    shapes = {p.layer_name: p.shape for p in parameter_table(cfg)}
    for name, layer in layers.items():
        out_features = shapes[name][0]
        groups = layer.group_count(out_features)
        if groups != 1:
            return f"it holds one scale per tensor, and {name} has {groups} (quant.weight.groups)"
        if layer.activation_bits != 8:
            return f"its consumer quantises activations, and the inputs of {name} are floats (quant.activation.bits)"
        if out_features % CODES_PER_BYTE:
            return f"it packs {CODES_PER_BYTE} output rows into a byte, and {name} has {out_features}"
    return None


# Add a format: its rule here, its writer in bitnet_train.export.writers.
FORMAT_RULES: dict[str, Callable[[DecoderConfig, QuantSpec], str | None]] = {"hf-packed": hf_packed_obstacle}


def check_formats(cfg: ExportConfig, model: DecoderConfig, spec: QuantSpec) -> None:
    """Raises ConfigError when a format that the configuration names is unknown or cannot hold the model."""
    if cfg.verify_tokens < 2:
        raise ConfigError(f"export.verify_tokens is {cfg.verify_tokens}; it must be at least 2.")
    for name in cfg.formats or []:
        if name not in FORMAT_RULES:
            near = did_you_mean(name, FORMAT_RULES)
            raise ConfigError(f"export.formats: '{name}' does not exist; choose from {', '.join(FORMAT_RULES)}.{near}")
        obstacle = FORMAT_RULES[name](model, spec)
        if obstacle:
            others = [n for n, rule in FORMAT_RULES.items() if rule(model, spec) is None]
            would_do = f"formats that can: {', '.join(others)}" if others else "no other format can either"
            raise ConfigError(f"export.formats: {name} cannot hold this model: {obstacle}; {would_do}.")


def fitting_formats(cfg: ExportConfig, model: DecoderConfig, spec: QuantSpec) -> tuple[list[str], dict[str, str]]:
    """The formats to write, and for those left out by ``formats=null`` the reason."""
    if cfg.formats is not None:
        check_formats(cfg, model, spec)
        return list(cfg.formats), {}
    obstacles = {name: rule(model, spec) for name, rule in FORMAT_RULES.items()}
    return [n for n, o in obstacles.items() if o is None], {n: o for n, o in obstacles.items() if o is not None}
