"""Puts a model into the state that progressive quantisation is in at a step."""

import torch
from torch import Tensor, nn

from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.quant.progress import QuantState


class QuantProgress:
    """Applies :class:`QuantState` after state to the BitLinear layers of ``model``, whose blocks are ``layers.N``.

    Numbers are written into tensors that stay where they are, so that compiled code goes on while only they change; it
    is compiled again when the kind of the arithmetic does: float, blended, integers, or other bits.

    Args:
        model: a module whose BitLinear layers have names that begin with ``layers.N`` (others count as the last block).
        seed: chooses the masks of Quant-Noise, with the step.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
        self.seed = seed
        self._strengths: dict[int, Tensor] = {}

    def apply(self, state: QuantState, step: int, cache: CodeCache | None) -> None:
        """Put the model into ``state`` for step ``step`` (from 0); ``cache`` is what keeps its codes, if any."""
        stale = False
        for name, layer in self.layers.items():
            wanted = state.spec.for_layer(name)
            if layer.quant != wanted:
                layer.quant, stale = wanted, True
        if stale and cache is not None:
            cache.rebuild()
        if state.complete:
            for layer in self.layers.values():
                layer.blend(None, None)
        elif state.noise is not None:
            self._mask(state.noise, step)
        else:
            assert state.strengths is not None
            self._blend(state.strengths)

    def _blend(self, strengths: tuple[float, ...]) -> None:
        for name, layer in self.layers.items():
            block, device = block_number(name, len(strengths)), layer.weight.device
            # One tensor for all layers of a block, whose inputs are then quantised once.
            if block not in self._strengths or self._strengths[block].device != device:
                self._strengths[block] = torch.empty((), device=device)
            value = self._strengths[block]
            # A move of the model gives each layer copies of its own.
            if layer.weight_blend is not value or layer.input_blend is not value:
                layer.blend(value, value)
            value.fill_(strengths[block])
            if strengths[block] == 0:
                # No gradient reaches a learned scale yet: it follows its weights until they are quantised.
                layer.reset_scale()

    @torch.no_grad()
    def _mask(self, rate: float, step: int) -> None:
        for number, layer in enumerate(self.layers.values()):
            device, mask = layer.weight.device, layer.weight_blend
            if mask is None or mask.shape != layer.weight.shape or mask.device != device:
                mask = torch.empty(layer.weight.shape, device=device)
                layer.blend(mask, torch.ones((), device=device))
            # A pure function of seed, step and layer, whatever else draws random numbers.
            chosen = (self.seed * 1_000_003 + step) * 65_537 + number
            generator = torch.Generator(device).manual_seed(chosen % 2**63)
            mask.bernoulli_(rate, generator=generator)


def block_number(name: str, blocks: int) -> int:
    """The block that the module called ``name`` belongs to; the last one where the name has no block."""
    parts = name.split(".")
    if len(parts) > 1 and parts[0] == "layers" and parts[1].isdigit():
        return int(parts[1])
    return blocks - 1
