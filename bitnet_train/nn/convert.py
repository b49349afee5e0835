"""Conversion of any PyTorch model: its ``nn.Linear`` layers become BitLinear, checked, or nothing is changed.

Weights and biases are copied bit for bit; type, device, ``requires_grad``, training mode and hooks go along, tied
weights stay tied. What cannot be converted without changing what the model computes is left alone and listed with the
reason. Every check that fails puts the old layers back, the very same objects.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_train.errors import BitnetTrainError, ConfigError, ConversionError
from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.convert_checks import Bounds, OutputReport, compare_outputs, record
from bitnet_train.nn.convert_plan import DEFAULT_EXCLUDE, Swap, places_of, plan_conversion, refuse_shared_inputs
from bitnet_train.quant.spec import LayerQuant, QuantSpec
from bitnet_train.quant.weights import statistic_scale

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
    swaps, skipped = plan_conversion(model, spec, include, exclude)
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
    refuse_shared_inputs(model)
    places = [
        (name, parent, attribute, layer)
        for name, parent, attribute, layer in places_of(model)
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
    """A context manager in which every BitLinear of ``model`` computes what nn.Linear would."""
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    before = [(layer.weight_blend, layer.input_blend) for layer in layers]
    for layer in layers:
        nothing = torch.zeros((), device=layer.weight.device)
        layer.blend(nothing, nothing)
    try:
        yield
    finally:
        for layer, blend in zip(layers, before, strict=True):
            layer.blend(*blend)


def _build(swaps: list[Swap], spec: QuantSpec, backend: Backend | None) -> None:
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
        if new.weight_scale is not None:
            new.weight_scale = nn.Parameter(statistic_scale(new.weight, swap.quant))
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


def _built(swap: Swap) -> BitLinear:
    assert swap.new is not None
    return swap.new


def _check_transfer(swap: Swap) -> None:
    """Raises ConversionError when a parameter of the new layer is missing, of another kind, or not the same bytes."""
    old, new, name = dict(swap.old.named_parameters()), dict(_built(swap).named_parameters()), swap.names[0]
    new.pop("weight_scale", None)  # a learned one is made from the weights
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


def _check_none_left(model: nn.Module, swaps: list[Swap], skipped: dict[str, str]) -> None:
    """Raises ConversionError when a layer that should be a BitLinear is not."""
    modules = {name: module for name, _, _, module in places_of(model)}
    for name, module in modules.items():
        if type(module) is nn.Linear and name not in skipped:
            raise ConversionError(f"{name}: audit: it is still nn.Linear; nothing was changed.")
    for swap in swaps:
        for name in swap.names:
            if modules.get(name) is not swap.new:
                raise ConversionError(f"{name}: audit: the new layer is not in its place; nothing was changed.")


def _roll_back(swaps: list[Swap]) -> None:
    for swap in swaps:
        for parent, attribute in swap.places:
            setattr(parent, attribute, swap.old)
