"""Which layers of a model are converted, and why the others are not. Nothing is changed here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.quant.spec import LayerQuant, QuantSpec

# The output head, which stays a float layer in every BitNet; heads of another name are found by
# ``get_output_embeddings``, where the model has it.
DEFAULT_EXCLUDE = ("lm_head", "*.lm_head")
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Swap:
    """A layer to convert: the modules and attributes that hold it, itself, and its successor once that is built."""

    names: list[str]
    places: list[tuple[nn.Module, str]]
    old: nn.Linear
    quant: LayerQuant
    new: BitLinear | None = None
    digests: dict[str, str] = field(default_factory=dict)


def places_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(name, parent, attribute, module) of every place that holds a module; one module may stand in several."""
    for parent_name, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is not None:
                yield f"{parent_name}.{attribute}" if parent_name else attribute, parent, attribute, module


def refuse_shared_inputs(model: nn.Module) -> None:
    """Raises ConfigError for a decoder of ours, whose forward holds on to the layers that it was built with."""
    if any(isinstance(module, SharedInput) for module in model.modules()):
        raise ConfigError(
            "This is a model of bitnet_train, which is built with its quantised layers: build it with another quant= "
            "instead of converting it."
        )


def plan_conversion(
    model: nn.Module, spec: QuantSpec, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Swap], dict[str, str]]:
    """What will be converted, and why everything else with a matrix of its own will not. Changes nothing."""
    refuse_shared_inputs(model)
    if isinstance(model, nn.Linear):
        raise ConfigError("The model is a single linear layer, which cannot be replaced in place: build a BitLinear.")
    swaps: dict[int, Swap] = {}
    skipped: dict[str, str] = {}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for name, parent, attribute, module in places_of(model):
        if not isinstance(module, nn.Linear):
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                kind = type(module).__name__
                skipped[name] = "an embedding" if isinstance(module, nn.Embedding) else f"{kind} is no nn.Linear"
        elif id(module) in swaps:
            swaps[id(module)].names.append(name)
            swaps[id(module)].places.append((parent, attribute))
        else:
            swaps[id(module)] = Swap([name], [(parent, attribute)], module, spec.for_layer(name))
    for swap in swaps.values():
        if len({spec.for_layer(name) for name in swap.names}) > 1:
            raise ConfigError(
                f"{' and '.join(swap.names)} are one layer, and quant.overrides quantises them differently."
            )
    linears = [name for swap in swaps.values() for name in swap.names]
    _check_patterns(linears, spec, include, exclude)
    for key, swap in list(swaps.items()):
        reason = _obstacle(swap, head, include, exclude)
        if reason is not None:
            skipped |= dict.fromkeys(swap.names, reason)
            del swaps[key]
    _leave_tied(model, swaps, skipped)
    if not swaps:
        raise ConfigError("No layer of this model can be converted: " + _reasons(skipped) + ".")
    for swap in swaps.values():
        if swap.old.weight.is_meta:
            raise ConfigError(f"{swap.names[0]} is on the meta device: load the model's weights first.")
        try:
            swap.quant.group_count(swap.old.out_features)
        except ConfigError as error:
            raise ConfigError(f"{swap.names[0]}: {error}") from None
        swap.quant.inputs.check_width(swap.names[0], swap.old.in_features)
        if swap.quant.hadamard:
            raise ConfigError(
                f"{swap.names[0]}: quant.activation.hadamard is for weights that were trained in the rotated basis; "
                "convert without it."
            )
    return list(swaps.values()), dict(sorted(skipped.items()))


def _reasons(skipped: dict[str, str]) -> str:
    first = [f"{name} ({reason})" for name, reason in list(skipped.items())[:3]]
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return (", ".join(first) + more) if first else "it has no linear layer"


def _check_patterns(linears: list[str], spec: QuantSpec, include: Sequence[str], exclude: Sequence[str]) -> None:
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if pattern not in ("*", *DEFAULT_EXCLUDE) and not any(fnmatchcase(name, pattern) for name in linears):
                raise ConfigError(f"{key}: the pattern '{pattern}' matches no linear layer; {_examples(linears)}.")
    for pattern in spec.unmatched(linears):
        raise ConfigError(
            f"quant.overrides: the pattern '{pattern}' matches no linear layer of this model; {_examples(linears)}."
        )


def _examples(linears: list[str]) -> str:
    return f"names look like '{linears[0]}'" if linears else "it has none"


def _obstacle(swap: Swap, head: object, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why the layer is left alone, or None."""
    layer = swap.old
    if isinstance(layer, BitLinear):
        return "quantised already"
    for pattern in exclude:
        if any(fnmatchcase(name, pattern) for name in swap.names):
            return f"excluded by '{pattern}'"
    if layer is head:
        return "the output head"
    if not all(any(fnmatchcase(name, pattern) for pattern in include) for name in swap.names):
        return "not among the included"
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is a subclass of nn.Linear"
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in swap.places):
        return "nn.TransformerEncoderLayer reads its weights past its forward"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    beside = sorted((set(layer._parameters) - {"weight", "bias"}) | set(layer._buffers) | set(layer._modules))
    if beside:
        return f"it holds {', '.join(beside)} as well"
    if layer.weight.dtype not in FLOAT_TYPES:
        return f"its weight is {str(layer.weight.dtype).removeprefix('torch.')}"
    if not swap.quant.quantised:
        return "quant leaves it float"
    return None


def _leave_tied(model: nn.Module, swaps: dict[int, Swap], skipped: dict[str, str]) -> None:
    """Take out the layers whose parameters belong to a module that is not converted as well."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module_name, module))
    changed = True
    while changed:
        changed = False
        for key, swap in list(swaps.items()):
            for parameter in swap.old.parameters():
                other = next((n for n, module in owners[id(parameter)] if id(module) not in swaps), None)
                if other is not None:
                    skipped |= dict.fromkeys(swap.names, f"tied to {other or 'the model'}")
                    del swaps[key]
                    changed = True
                    break
