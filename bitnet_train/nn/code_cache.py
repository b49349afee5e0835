"""Keeps the codes of a model as buffers: ternarised once per optimizer step instead of once per forward.

Micro-batches, recomputation, backward and evaluation then share one ternarisation. The codes are refreshed by hooks
after every optimizer step and after loading a state dict, and by :meth:`CodeCache.refresh` after any other edit of the
weights. Parameter version counters are not used: ``AdamW(fused=True)`` and edits through ``.data`` do not move them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.quant.weights import Codes, quantise_weight


@dataclass
class CodeStatistics:
    """Counts over all quantised layers at one refresh; tensors, so that nothing waits for the device."""

    zeros: Tensor
    flips: Tensor
    total: int

    def zero_share(self) -> float:
        """Share of the codes that are zero."""
        return float(self.zeros) / self.total

    def flip_rate(self) -> float:
        """Share of the codes that the last refresh changed."""
        return float(self.flips) / self.total


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
        self._layers = [m for m in model.modules() if isinstance(m, BitLinear)]
        self._shared = [m for m in model.modules() if isinstance(m, SharedInput) and m.stackable]
        self._handles: list[Any] = [model.register_load_state_dict_post_hook(_refresh_loaded)]
        if optimizer is not None:
            self.attach(optimizer)
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
        zeros: list[Tensor] = []
        flips: list[Tensor] = []
        for layer in self._layers:
            fresh, kept = quantise_weight(layer.weight, layer.quant), layer.kept
            if measure:
                zeros.append((fresh.codes == 0).sum())
                if kept is not None:
                    flips.append((fresh.codes != kept.codes).sum())
            _keep_in_place(layer, fresh)
        for shared in self._shared:
            keep_stack(shared)
        if measure and zeros:
            none = torch.zeros_like(zeros[0])
            total = sum(layer.weight.numel() for layer in self._layers)
            self.statistics = CodeStatistics(sum(zeros, none), sum(flips, none), total)

    def measure_next(self) -> None:
        """Count zeros and flips in the next refresh (one pass over the codes, so not in every step)."""
        self._measure_next = True

    def release(self) -> None:
        """Forget the codes and the hooks; the layers derive codes in every forward again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in self._layers:
            layer.keep(None)
        for shared in self._shared:
            shared.codes = shared.row_scale = None


def _keep_in_place(layer: BitLinear, fresh: Codes) -> None:
    kept = layer.kept
    if kept is not None and kept.codes.device == fresh.codes.device:
        # In place: compiled graphs hold the buffers, and the codes may be views of a stack.
        kept.codes.copy_(fresh.codes)
        kept.scale.copy_(fresh.scale)
    else:
        layer.keep(fresh)


@torch.inference_mode(False)
@torch.no_grad()
def _refresh_loaded(model: nn.Module, _: Any) -> None:
    """Refreshes the codes that ``model`` keeps; a plain function of the model, so that copies and pickles carry it."""
    for layer in model.modules():
        if isinstance(layer, BitLinear) and layer.kept is not None:
            _keep_in_place(layer, quantise_weight(layer.weight, layer.quant))
    for shared in model.modules():
        if isinstance(shared, SharedInput) and shared.codes is not None:
            keep_stack(shared)


@torch.no_grad()
def keep_stack(shared: SharedInput) -> None:
    """Bring the kept codes of the layers into the stacked buffers of ``shared``.

    The stack is allocated when it is missing or on another device; the layers' codes then become views of it, so that
    later refreshes write straight into it. (Moving the model to a device undoes the views, never the values.)
    """
    layers = shared.bit_layers
    kept = [layer.quantised() for layer in layers]
    if shared.codes is None or shared.codes.device != kept[0].codes.device:
        shared.codes, shared.row_scale = torch.cat([k.codes for k in kept]), torch.cat([k.row_scale() for k in kept])
        parts = torch.split(shared.codes, [layer.out_features for layer in layers])
        for layer, k, part in zip(layers, kept, parts, strict=True):
            layer.keep(Codes(part, k.scale))
        return
    assert shared.row_scale is not None
    rows = [layer.out_features for layer in layers]
    parts, scales = torch.split(shared.codes, rows), torch.split(shared.row_scale, rows)
    for k, part, scale in zip(kept, parts, scales, strict=True):
        if k.codes.data_ptr() != part.data_ptr():
            part.copy_(k.codes)
        scale.copy_(k.row_scale())


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
            layer.weight = nn.Parameter(given.scale.new_empty(0), requires_grad=False)
    for shared in model.modules():
        if isinstance(shared, SharedInput) and shared.stackable:
            keep_stack(shared)
