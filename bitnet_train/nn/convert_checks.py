"""What a conversion does to a model's outputs: nothing while quantisation is off, something bounded once it is on."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_train.errors import ConversionError

# Rows of a layer's input that its statistics are taken on.
MOST_ROWS = 1024


@dataclass(frozen=True)
class Bounds:
    """How far a conversion may move outputs before it counts as broken and is undone.

    A ternary layer keeps 0.44 of the output variance of normally distributed weights on independent inputs, 0.56 of
    uniform ones (binary: 0.64 and 0.75); inputs with a common direction move it further either way. A wrong scale or
    group moves it by orders of magnitude (the BitLinear of a much copied early package: 1150 instead of 0.33).
    """

    # With quantisation off: largest difference relative to the largest output, in units of the type's epsilon.
    off: float = 64.0
    # With it on, for every layer on its own input: variance at most so many times nn.Linear's, at least 1 / so many.
    variance: float = 32.0
    # And the mean at most so many of nn.Linear's standard deviations away.
    mean: float = 3.0


@dataclass(frozen=True)
class LayerStatistics:
    """Mean and variance over all outputs of a layer, as nn.Linear and as BitLinear, on the same input."""

    float_mean: float
    float_variance: float
    mean: float
    variance: float


@dataclass(frozen=True)
class OutputReport:
    """The model's outputs after conversion against those before."""

    # Largest difference with quantisation off, absolute.
    off: float
    # Largest difference with quantisation on, absolute, and |difference| / |output| in the L2 norm.
    on: float
    on_relative: float
    statistics: dict[str, LayerStatistics]
    # Converted layers that the examples did not reach.
    unreached: list[str]


@dataclass(frozen=True)
class Recorded:
    """The model's outputs on its examples, and what went into each layer (rows, in)."""

    examples: Sequence[Any] | Mapping[str, Any]
    outputs: list[Tensor]
    inputs: dict[str, Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context manager: eval mode, no gradients; each module's own training mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_examples(model: nn.Module, examples: Sequence[Any] | Mapping[str, Any]) -> list[Tensor]:
    """All float tensors in the model's output, in order."""
    result = model(**examples) if isinstance(examples, Mapping) else model(*examples)
    return [tensor.detach().clone() for tensor in tensors(result) if tensor.is_floating_point()]


def tensors(result: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for item in result.values():
            yield from tensors(item)
    elif isinstance(result, list | tuple):
        for item in result:
            yield from tensors(item)


def record(model: nn.Module, layers: dict[str, nn.Linear], examples: Sequence[Any] | Mapping[str, Any]) -> Recorded:
    """Run ``model`` on its examples before anything is changed."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if name not in inputs and x.numel():
                inputs[name] = x.detach().reshape(-1, x.shape[-1])[:MOST_ROWS].clone()

        return hook

    handles = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            return Recorded(examples, run_examples(model, examples), inputs)
    finally:
        for handle in handles:
            handle.remove()


def compare_outputs(
    model: nn.Module,
    before: Recorded,
    layers: dict[str, tuple[nn.Linear, nn.Linear]],
    bounds: Bounds,
    unquantised: Callable[[nn.Module], AbstractContextManager[None]],
) -> OutputReport:
    """Hold the converted model against ``before``; ``layers`` maps names to (old, new).

    Raises ConversionError with the layer and the check when an output is not finite or beyond ``bounds``.
    """
    if not before.inputs:
        raise ConversionError(
            "the model: outputs: none of the layers is called in the model's forward on the examples, which would run "
            "past the converted ones; nothing was changed."
        )
    with evaluating(model):
        with unquantised(model):
            for name, x in before.inputs.items():
                old, new = layers[name]
                _same(name, nn.Linear.forward(old, x), new.forward(x), bounds)
            off = _same_outputs(before.outputs, run_examples(model, before.examples), bounds)
        statistics = {name: _statistics(name, *layers[name], x, bounds) for name, x in before.inputs.items()}
        found = run_examples(model, before.examples)
    on, change, size = 0.0, 0.0, 0.0
    for wanted, output in zip(before.outputs, found, strict=True):
        there = torch.isfinite(wanted)
        difference = (output[there].double() - wanted[there].double()).abs()
        if not bool(torch.isfinite(difference).all()):
            raise ConversionError(
                "the model: finite: with quantisation on an output is NaN or infinite; nothing was changed."
            )
        on = max(on, float(difference.max())) if difference.numel() else on
        change += float(difference.pow(2).sum())
        size += float(wanted[there].double().pow(2).sum())
    unreached = [name for name in layers if name not in before.inputs]
    return OutputReport(off, on, math.sqrt(change / size) if size else 0.0, statistics, unreached)


def _same(name: str, wanted: Tensor, found: Tensor, bounds: Bounds) -> float:
    """The largest difference. Raises ConversionError when it is more than rounding."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        raise ConversionError(
            f"{name}: outputs: {tuple(found.shape)} {found.dtype} instead of {tuple(wanted.shape)} {wanted.dtype}; "
            "nothing was changed."
        )
    finite = torch.isfinite(wanted)
    if not wanted[finite].numel():
        return 0.0
    difference = float((found[finite].double() - wanted[finite].double()).abs().max())
    allowed = bounds.off * torch.finfo(wanted.dtype).eps * float(wanted[finite].double().abs().max())
    if not difference <= allowed:
        raise ConversionError(
            f"{name}: outputs: with quantisation off they differ by {difference:.2g} (allowed: {allowed:.2g}); nothing "
            "was changed."
        )
    return difference


def _same_outputs(wanted: list[Tensor], found: list[Tensor], bounds: Bounds) -> float:
    if len(wanted) != len(found):
        raise ConversionError(
            f"the model: outputs: {len(found)} tensors instead of {len(wanted)}; nothing was changed."
        )
    return max((_same("the model", *pair, bounds) for pair in zip(wanted, found, strict=True)), default=0.0)


def _statistics(name: str, old: nn.Linear, new: nn.Linear, x: Tensor, bounds: Bounds) -> LayerStatistics:
    plain, quantised = nn.Linear.forward(old, x).double(), new.forward(x).double()
    found = LayerStatistics(
        float(plain.mean()), float(plain.var(correction=0)), float(quantised.mean()), float(quantised.var(correction=0))
    )
    if not (math.isfinite(found.mean) and math.isfinite(found.variance)):
        raise ConversionError(f"{name}: finite: its quantised outputs are not; nothing was changed.")
    # What a weight or an input below the smallest scale amounts to is no deviation.
    nothing = 1e-12 + 1e-6 * found.float_mean**2
    if found.float_variance > nothing and not (
        found.float_variance / bounds.variance <= found.variance <= found.float_variance * bounds.variance
    ):
        raise ConversionError(
            f"{name}: statistics: the variance of its outputs is {found.variance:.3g} and was "
            f"{found.float_variance:.3g}; nothing was changed."
        )
    if abs(found.mean - found.float_mean) > bounds.mean * math.sqrt(found.float_variance) + math.sqrt(nothing):
        raise ConversionError(
            f"{name}: statistics: the mean of its outputs is {found.mean:.3g} and was {found.float_mean:.3g} with a "
            f"standard deviation of {math.sqrt(found.float_variance):.3g}; nothing was changed."
        )
    return found
