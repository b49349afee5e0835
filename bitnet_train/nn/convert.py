"""Conversion of any PyTorch model: its ``nn.Linear`` layers become BitLinear, checked, or nothing is changed.

Weights and biases are copied bit for bit; type, device, ``requires_grad``, training mode and hooks go along, tied
weights stay tied. What cannot be converted without changing what the model computes is left alone and listed with the
reason. Every check that fails puts the old layers back, the very same objects.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_train.errors import BitnetTrainError, ConfigError, ConversionError
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.convert_checks import Bounds, OutputReport, compare_outputs, record
from bitnet_train.quant.spec import LayerQuant, QuantSpec

# The output head, which stays a float layer in every BitNet; heads of another name are found by
# ``get_output_embeddings``, where the model has it.
DEFAULT_EXCLUDE = ("lm_head", "*.lm_head")
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where nn.Module keeps hooks. The dictionaries themselves go to the new layer, so that handles can still remove them.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HOOK_DETAILS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer that became a BitLinear."""

    # Where it stands in the model; several names when it is used in several places.
    names: tuple[str, ...]
    # (out, in)
    shape: tuple[int, int]
    bias: bool
    quant: LayerQuant
    # Hooks that went along.
    hooks: int
    # sha256 of the bytes of each parameter.
    digests: dict[str, str]


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did: every layer, every module with matrices that was left alone and why, the outputs."""

    layers: list[ConvertedLayer]
    # Module name -> reason.
    skipped: dict[str, str]
    # None when no examples were given.
    outputs: OutputReport | None = None

    @property
    def digest(self) -> str:
        """sha256 over the checksums of all transferred parameters, in order."""
        joined = hashlib.sha256()
        for layer in self.layers:
            for name, digest in layer.digests.items():
                joined.update(f"{layer.names[0]}.{name}={digest}\n".encode())
        return joined.hexdigest()

    @property
    def parameters(self) -> int:
        """Weights that are codes now."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)


@dataclass
class _Swap:
    """A layer to convert: the modules and attributes that hold it, itself, and its successor once that is built."""

    names: list[str]
    places: list[tuple[nn.Module, str]]
    old: nn.Linear
    quant: LayerQuant
    new: BitLinear | None = None
    digests: dict[str, str] = field(default_factory=dict)


def convert(
    model: nn.Module,
    quant: QuantSpec | LayerQuant = LayerQuant(),  # noqa: B008  (frozen)
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    examples: Sequence[Any] | Mapping[str, Any] | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008
    backend: Backend | None = None,
) -> ConversionReport:
    """Replace the ``nn.Linear`` layers of ``model`` by BitLinear in place, or raise and leave it as it was.

    Build optimizers afterwards: the parameters are copies. Until the old layers are let go at the end, the converted
    weights exist twice.

    Args:
        model: any module; of its layers, only plain ``nn.Linear`` (no subclass) is converted.
        quant: how. Patterns of a QuantSpec's overrides are matched against the model's own module names.
        include, exclude: module-name patterns with ``*`` and ``?``; exclude wins. Embeddings are no linear layers, and
            the output head is always left alone.
        examples: positional or keyword arguments of the model. With them the model is run in eval mode before, after
            with quantisation off (the outputs must be the same, to rounding), and after with it on.
        bounds: how far outputs may move; see :class:`bitnet_train.nn.convert_checks.Bounds`.
        backend: kernel backend of the new layers; chosen by device when None.

    Raises ConfigError when nothing is left to convert, a pattern matches nothing or groups do not divide a layer, and
    ConversionError, which names the layer and the check, when a check fails.
    """
    spec = quant if isinstance(quant, QuantSpec) else QuantSpec(quant)
    swaps, skipped = _plan(model, spec, include, exclude)
    before = None if examples is None else record(model, {swap.names[0]: swap.old for swap in swaps}, examples)
    name = "the model"
    try:
        for swap in swaps:
            name = swap.names[0]
            swap.digests = _digests(swap.old)
        _build(swaps, spec, backend)
        for swap in swaps:
            name = swap.names[0]
            _check_transfer(swap)
        for swap in swaps:
            name = swap.names[0]
            for parent, attribute in swap.places:
                setattr(parent, attribute, swap.new)
        name = "the model"
        _check_none_left(model, swaps, skipped)
        outputs = None
        if before is not None:
            layers: dict[str, tuple[nn.Linear, nn.Linear]] = {swap.names[0]: (swap.old, _built(swap)) for swap in swaps}
            outputs = compare_outputs(model, before, layers, bounds, unquantised)
    except BaseException as error:
        _roll_back(swaps)
        if isinstance(error, BitnetTrainError) or not isinstance(error, Exception):
            raise
        raise ConversionError(
            f"{name}: the transfer failed ({type(error).__name__}: {error}); nothing was changed."
        ) from (error)
    layers_done = [
        ConvertedLayer(
            tuple(swap.names), (swap.old.out_features, swap.old.in_features), swap.old.bias is not None, swap.quant,
            sum(len(swap.old.__dict__[hooks] or ()) for hooks in HOOKS), swap.digests,
        )
        for swap in swaps
    ]  # fmt: skip
    return ConversionReport(layers_done, skipped, outputs)


def revert(model: nn.Module) -> list[str]:
    """Replace every BitLinear of ``model`` by an ``nn.Linear`` with its master weights, in place; the layers' names.

    The parameters stay the same objects. Raises ConfigError when a layer has no master weights, only codes.
    """
    _refuse_shared_inputs(model)
    places = [
        (name, parent, attribute, layer)
        for name, parent, attribute, layer in _places(model)
        if isinstance(layer, BitLinear)
    ]
    for name, _, _, layer in places:
        if not layer.weight.numel():
            raise ConfigError(f"{name} holds codes and no master weights: there is nothing to go back to.")
    own = frozenset(BitLinear(1, 1, device="meta").__dict__)
    found: dict[int, nn.Linear] = {}
    names = []
    for name, parent, attribute, layer in places:
        if id(layer) not in found:
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight, plain.bias = layer.weight, layer.bias
            _take_along(layer, plain, leave=own)
            found[id(layer)] = plain
            names.append(name)
        setattr(parent, attribute, found[id(layer)])
    return names


@contextmanager
def unquantised(model: nn.Module) -> Iterator[None]:
    """A context manager in which every BitLinear of ``model`` that is called computes what nn.Linear would."""
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    for layer in layers:
        layer.__dict__["forward"] = MethodType(nn.Linear.forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(name, parent, attribute, module) of every place that holds a module; one module may stand in several."""
    for parent_name, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is not None:
                yield f"{parent_name}.{attribute}" if parent_name else attribute, parent, attribute, module


def _refuse_shared_inputs(model: nn.Module) -> None:
    if any(isinstance(module, SharedInput) for module in model.modules()):
        raise ConfigError(
            "This is a model of bitnet_train, which is built with its quantised layers: build it with another quant= "
            "instead of converting it."
        )


def _plan(
    model: nn.Module, spec: QuantSpec, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[_Swap], dict[str, str]]:
    """What will be converted, and why everything else with a matrix of its own will not. Changes nothing."""
    _refuse_shared_inputs(model)
    if isinstance(model, nn.Linear):
        raise ConfigError("The model is a single linear layer, which cannot be replaced in place: build a BitLinear.")
    swaps: dict[int, _Swap] = {}
    skipped: dict[str, str] = {}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for name, parent, attribute, module in _places(model):
        if not isinstance(module, nn.Linear):
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                kind = type(module).__name__
                skipped[name] = "an embedding" if isinstance(module, nn.Embedding) else f"{kind} is no nn.Linear"
        elif id(module) in swaps:
            swaps[id(module)].names.append(name)
            swaps[id(module)].places.append((parent, attribute))
        else:
            swaps[id(module)] = _Swap([name], [(parent, attribute)], module, spec.for_layer(name))
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


def _obstacle(swap: _Swap, head: object, include: Sequence[str], exclude: Sequence[str]) -> str | None:
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


def _leave_tied(model: nn.Module, swaps: dict[int, _Swap], skipped: dict[str, str]) -> None:
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


def _build(swaps: list[_Swap], spec: QuantSpec, backend: Backend | None) -> None:
    """Make the new layers and copy the parameters; one Parameter for every one that was shared."""
    copies: dict[int, nn.Parameter] = {}
    for swap in swaps:
        old = swap.old
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            new = BitLinear(
                old.in_features, old.out_features, bias=old.bias is not None, quant=swap.quant, backend=backend,
                gradient=spec.gradient,
            )  # fmt: skip
        try:
            for name, parameter in old.named_parameters():
                if id(parameter) not in copies:
                    copies[id(parameter)] = copy_parameter(parameter)
                setattr(new, name, copies[id(parameter)])
        except Exception as error:
            raise ConversionError(
                f"{swap.names[0]}: the transfer failed ({type(error).__name__}: {error}); nothing was changed."
            ) from error
        _take_along(old, new)
        swap.new = new


def copy_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A copy of ``parameter`` with its type, device, ``requires_grad`` and attributes, without its gradient."""
    with torch.no_grad():
        copied = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
        copied.copy_(parameter)
    copied.__dict__.update(parameter.__dict__)
    return copied


def _take_along(old: nn.Linear, new: nn.Linear, leave: frozenset[str] = frozenset()) -> None:
    """Training mode, hooks and what else was set on the old layer."""
    new.training = old.training
    for key, value in old.__dict__.items():
        if key in HOOKS + HOOK_DETAILS or (key not in new.__dict__ and key not in leave):
            new.__dict__[key] = value


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def _digests(layer: nn.Linear) -> dict[str, str]:
    return {name: tensor_digest(parameter) for name, parameter in layer.named_parameters()}


def _built(swap: _Swap) -> BitLinear:
    assert swap.new is not None
    return swap.new


def _check_transfer(swap: _Swap) -> None:
    """Raises ConversionError when a parameter of the new layer is missing, of another kind, or not the same bytes."""
    old, new, name = dict(swap.old.named_parameters()), dict(_built(swap).named_parameters()), swap.names[0]
    if set(old) != set(new):
        lost = ", ".join(sorted(set(old) ^ set(new)))
        raise ConversionError(f"{name}: parameters: {lost} is not in both layers; nothing was changed.")
    for key, parameter in old.items():
        for what, of in KINDS.items():
            if of(parameter) != of(new[key]):
                raise ConversionError(
                    f"{name}: {what} of {key}: {of(new[key])} instead of {of(parameter)}; nothing was changed."
                )
        if tensor_digest(new[key]) != swap.digests[key] or tensor_digest(parameter) != swap.digests[key]:
            raise ConversionError(f"{name}: checksum: the bytes of {key} are not those before; nothing was changed.")
        if not bool(torch.isfinite(parameter).all()):
            raise ConversionError(f"{name}: finite: {key} holds NaN or infinity; nothing was changed.")


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda p: tuple(p.shape),
    "type": lambda p: str(p.dtype),
    "device": lambda p: str(p.device),
    "requires_grad": lambda p: p.requires_grad,
}


def _check_none_left(model: nn.Module, swaps: list[_Swap], skipped: dict[str, str]) -> None:
    """Raises ConversionError when a layer that should be a BitLinear is not."""
    modules = {name: module for name, _, _, module in _places(model)}
    for name, module in modules.items():
        if type(module) is nn.Linear and name not in skipped:
            raise ConversionError(f"{name}: audit: it is still nn.Linear; nothing was changed.")
    for swap in swaps:
        for name in swap.names:
            if modules.get(name) is not swap.new:
                raise ConversionError(f"{name}: audit: the new layer is not in its place; nothing was changed.")


def _roll_back(swaps: list[_Swap]) -> None:
    for swap in swaps:
        for parent, attribute in swap.places:
            setattr(parent, attribute, swap.old)
