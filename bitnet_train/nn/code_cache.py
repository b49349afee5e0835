"""Keeps the codes of a model as buffers: ternarised once per optimizer step instead of once per forward.

Micro-batches, recomputation, backward and evaluation then share one ternarisation. The codes are refreshed by hooks
after every optimizer step and after loading a state dict, and by :meth:`CodeCache.refresh` after any other edit of the
weights. Parameter version counters are not used: ``AdamW(fused=True)`` and edits through ``.data`` do not move them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_train.kernels.backend import Backend, WeightCodes
from bitnet_train.nn.bit_linear import BitLinear, SharedInput, stack_codes
from bitnet_train.quant.packing import pack_quarters
from bitnet_train.quant.weights import Codes


@dataclass
class CodeStatistics:
    """Counts per quantised layer at one refresh, int64 (layers,); tensors, so that nothing waits for the device."""

    zeros: Tensor
    flips: Tensor
    # Codes of each layer, by name.
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """Codes of all layers."""
        return sum(self.sizes.values())

    def zero_share(self) -> float:
        """Share of the codes that are zero."""
        return float(self.zeros.sum()) / self.total

    def flip_rate(self) -> float:
        """Share of the codes that the last refresh changed."""
        return float(self.flips.sum()) / self.total

    def by_layer(self) -> dict[str, tuple[float, float]]:
        """Share of zeros and of changed codes of every layer."""
        parts = zip(self.sizes.items(), self.zeros.tolist(), self.flips.tolist(), strict=True)
        return {name: (zeros / size, flips / size) for (name, size), zeros, flips in parts}


class CodeCache:
    """Holds the codes of every BitLinear in ``model`` from now on, until :meth:`release`.

    Args:
        model: any module with BitLinear layers; loading a state dict into it refreshes the codes.
        optimizer: if given, each of its steps refreshes the codes.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.statistics: CodeStatistics | None = None
        self._measure_next = False
        self._find_layers()
        self._handles: list[Any] = [model.register_load_state_dict_post_hook(self._on_load)]
        if optimizer is not None:
            self.attach(optimizer)
        self.refresh()

    @property
    def _on_load(self) -> Callable[[nn.Module, Any], None]:
        return _refresh_loaded

    @property
    def _quantise(self) -> "Quantise":
        return quantise_master

    def _find_layers(self) -> None:
        model = self.model
        self._shared = [m for m in model.modules() if isinstance(m, SharedInput) and m.stackable]
        stacked = {id(layer) for shared in self._shared for layer in shared.bit_layers}
        named = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
        self._layers = list(named.values())
        self._sizes = {name: layer.in_features * layer.out_features for name, layer in named.items()}
        self._single = [layer for layer in self._layers if id(layer) not in stacked]

    def rebuild(self) -> None:
        """Derive everything anew after the way in which layers are quantised has changed."""
        self._forget()
        self._find_layers()
        self.refresh()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Refresh after every step of ``optimizer``."""
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.refresh()))

    # Not inference_mode, even inside one: the buffers are saved for the backward of later steps.
    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, measure: bool = False) -> None:
        """Derive all codes from the master weights; with ``measure`` also count zeros and flips into ``statistics``."""
        measure = measure or self._measure_next
        self._measure_next = False
        before = {id(layer): layer.codes.clone() for layer in self._layers if measure and layer.codes is not None}
        modules: list[SharedInput | BitLinear] = [*self._shared, *self._single]
        for module in modules:
            refresh(module, self._quantise)
        if not measure or not self._layers:
            return
        zeros, flips = [], []
        for layer in self._layers:
            assert layer.codes is not None
            old = before.get(id(layer), layer.codes)
            zeros.append(layer.codes.eq(0).sum())
            flips.append(layer.codes.ne(old.to(layer.codes.device)).sum())
        self.statistics = CodeStatistics(torch.stack(zeros), torch.stack(flips), self._sizes)

    def measure_next(self) -> None:
        """Count zeros and flips in the next refresh (one pass over the codes, so not in every step)."""
        self._measure_next = True

    def release(self) -> None:
        """Forget the codes and the hooks; the layers derive codes in every forward again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def _forget(self) -> None:
        for layer in self._layers:
            layer.keep(None)
        for shared in self._shared:
            shared.keep(None)


@torch.inference_mode(False)
@torch.no_grad()
def _refresh_loaded(model: nn.Module, _: Any) -> None:
    """Refreshes the codes that ``model`` keeps; a plain function of the model, so that copies and pickles carry it."""
    keeping = [m for m in model.modules() if isinstance(m, (SharedInput, BitLinear)) and m.kept is not None]
    stacked = {id(layer) for m in keeping if isinstance(m, SharedInput) for layer in m.bit_layers}
    for module in keeping:
        if id(module) not in stacked:
            refresh(module)


# (layer, its backend, where the codes and their backward layout go or None) -> the layer's codes.
Quantise = Callable[[BitLinear, Backend, Tensor | None, Tensor | None], Codes]


def quantise_master(layer: BitLinear, kernels: Backend, codes: Tensor | None, backward: Tensor | None) -> Codes:
    """The codes of the layer's master weight, of all its rows where FSDP2 has sharded it: a shard's own mean would give
    other codes. A call for all processes then."""
    scale = None if layer.weight_scale is None else _whole(layer.weight_scale)
    return kernels.quantise_weight(_whole(layer.weight), layer.quant, codes, backward, scale)


def refresh(module: SharedInput | BitLinear, quantise: Quantise = quantise_master) -> None:
    """Bring the kept codes of a stack, or of a layer outside stacks, up to the master weights."""
    if isinstance(module, SharedInput):
        refresh_stack(module, quantise)
    else:
        refresh_layer(module, quantise)


def refresh_layer(layer: BitLinear, quantise: Quantise = quantise_master) -> None:
    """Bring the kept codes of a single layer up to its master weight, in place: compiled graphs hold the buffers."""
    kept, backend = layer.kept, layer.choose_backend(layer.weight.device)
    if kept is None or kept.codes.device != layer.weight.device:
        layer.keep(quantise(layer, backend, None, None))
    else:
        kept.scale.copy_(quantise(layer, backend, kept.codes, None).scale)


def refresh_stack(shared: SharedInput, quantise: Quantise = quantise_master) -> None:
    """Bring the stacked codes of ``shared`` up to the master weights, in place: compiled graphs hold the buffers.

    The stack is allocated when it is missing or on another device. The layers' codes are views of it, so one write
    serves both. (Moving the model to a device undoes the views; the next refresh makes them again.)
    """
    device = shared.bit_layers[0].weight.device
    if shared.codes is None or shared.codes.device != device:
        _allocate(shared, device)
    for layer, codes, row_scale, backward in _parts(shared):
        kernels, kept = layer.choose_backend(device), layer.kept
        fresh = quantise(layer, kernels, codes, backward)
        if kept is not None and kept.codes.data_ptr() == codes.data_ptr() and kept.codes.device == device:
            kept.scale.copy_(fresh.scale)
        else:
            layer.keep(Codes(codes, fresh.scale))
        row_scale.copy_(fresh.row_scale())


def _whole(weight: Tensor) -> Tensor:
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


def _allocate(shared: SharedInput, device: torch.device) -> None:
    layers = shared.bit_layers
    rows = sum(layer.out_features for layer in layers)
    codes = torch.zeros(rows, layers[0].in_features, dtype=torch.int8, device=device)
    dx, _ = layers[0].gradient.resolve("bf16")  # a float32 run reads no other layout
    backward = layers[0].choose_backend(device).backward_layout(codes, dx) if layers[0].quant.activation_bits else None
    shared.keep(WeightCodes(codes, torch.zeros(rows, device=device), backward))


def _parts(shared: SharedInput) -> Iterator[tuple[BitLinear, Tensor, Tensor, Tensor | None]]:
    """Each layer with its rows of the stack and of the row scales, and its columns of the backward layout."""
    layers, stack = shared.bit_layers, shared.kept
    assert stack is not None
    rows = [layer.out_features for layer in layers]
    backward = [None] * len(rows) if stack.backward is None else torch.split(stack.backward, rows, dim=1)
    return zip(layers, torch.split(stack.codes, rows), torch.split(stack.row_scale, rows), backward, strict=True)


def keep_codes(model: nn.Module, codes: dict[str, Codes]) -> None:
    """Give the BitLinear layers of ``model`` codes that have no master weights, as when an export is read back.

    ``codes`` maps module names to codes. The master weights are dropped, so that nothing can re-derive other codes.
    Raises KeyError when ``codes`` lacks a quantised layer or has one too many, and ValueError for a wrong shape.
    """
    if surplus := sorted(codes.keys() - {n for n, m in model.named_modules() if isinstance(m, BitLinear)}):
        raise KeyError(f"codes of no quantised layer: {surplus[0]}")
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            given = codes[name]
            if tuple(given.codes.shape) != (layer.out_features, layer.in_features):
                raise ValueError(f"{name}: codes of shape {tuple(given.codes.shape)} for {layer}")
            layer.keep(given)
            layer.weight, layer.weight_scale = nn.Parameter(given.scale.new_empty(0), requires_grad=False), None
    for shared in model.modules():
        if isinstance(shared, SharedInput) and shared.stackable:
            shared.keep(stack_codes(shared.bit_layers))
            for layer, part, _, _ in _parts(shared):
                assert layer.scale is not None
                layer.keep(Codes(part, layer.scale))


def pack_kept_codes(model: nn.Module) -> None:
    """Pack the codes of a model without master weights (:func:`keep_codes`) four to a byte, for generation.

    A quarter of the memory, and of what is read for every token; the results are the same bit for bit. Layers that
    take float inputs, and those whose input several layers of different kinds read, stay as they are.
    """
    for shared in model.modules():
        if not isinstance(shared, SharedInput) or not shared.stackable or shared.kept is None or shared.kept.packed:
            continue
        if shared.bit_layers[0].quant.activation_bits is None or any(
            layer.weight.numel() or layer.quant.largest_code > 1 for layer in shared.bit_layers
        ):
            continue
        shared.keep(WeightCodes(pack_quarters(shared.kept.codes), shared.kept.row_scale))
        for layer, part, _, _ in _parts(shared):
            assert layer.scale is not None
            layer.keep(Codes(part, layer.scale))
