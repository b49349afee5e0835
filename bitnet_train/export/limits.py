"""Limits that several formats have in common, as clauses that say what they meet."""

from bitnet_train.nn.config import DecoderConfig, Norms
from bitnet_train.nn.layout import quantised_layers
from bitnet_train.quant.spec import LayerQuant, QuantSpec


def foreign_family(cfg: DecoderConfig) -> str | None:
    """Why no architecture of other people's software computes this decoder, or None when one may."""
    if cfg.norms is Norms.inside:
        return "no architecture of its consumer has a norm in every projection (model.norms=inside)"
    return None


def foreign_inputs(name: str, layer: LayerQuant) -> str | None:
    """Why a consumer that quantises inputs to 8 bits per token, as BitNet b1.58 does, is wrong for layer ``name``."""
    if layer.activation_bits is None or layer.inputs.standard:
        return None
    changed = {
        "bits": layer.activation_bits != 8,
        "statistic": layer.activation_statistic != "absmax",
        "granularity": layer.activation_granularity != "token",
        "top_k": layer.top_k < 1,
        "hadamard": layer.hadamard,
    }
    keys = " and ".join(f"quant.activation.{key}" for key, differs in changed.items() if differs)
    return f"its consumer quantises inputs to 8 bits, one scale per token, and those of {name} are otherwise ({keys})"


def wide_codes(cfg: DecoderConfig, spec: QuantSpec) -> str | None:
    """Why two bits, or a ternary digit, do not hold the codes of the model, or None when they do."""
    for name, layer in quantised_layers(cfg, spec).items():
        if layer.largest_code > 1:
            return f"it holds codes -1, 0 and 1, and those of {name} have {layer.bits} bits (quant.weight.bits)"
    return None
