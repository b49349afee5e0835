"""BitLinear as a user writes it from BitNet's training FAQ, and a decoder that is made of such layers.

"The Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm, bitnet/, figure 3): norm inside the layer, both
quantisers in the type of their input, straight-through by ``detach``, both done again in every forward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.kernels.gating import gated
from bitnet_train.nn.bit_linear import SharedInput
from bitnet_train.nn.decoder import Block, Decoder
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import residual_sum


def activation_quant(x: Tensor) -> Tensor:
    """x (..., K) rounded to 8 bits per token, as floats."""
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def weight_quant(w: Tensor) -> Tensor:
    """w (N, K) rounded to {-1, 0, 1} times its mean magnitude, as floats."""
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


class TextbookBitLinear(nn.Linear):
    """The FAQ's BitLinear. ``norm`` is shared by the layers that read one input, as in our decoder; None for none."""

    def __init__(self, weight: Tensor, norm: RMSNorm | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        # In a tuple, so that the norm's parameters keep their one name.
        self.norm_ref = (norm,)

    def forward(self, x: Tensor) -> Tensor:
        norm, w = self.norm_ref[0], self.weight
        x_norm = x if norm is None else norm(x)
        x_quant = x_norm + (activation_quant(x_norm) - x_norm).detach()
        w_quant = w + (weight_quant(w) - w).detach()
        return F.linear(x_quant, w_quant)


class LayerByLayer(nn.Module):
    """Stands where a decoder has a SharedInput, and calls the layers one after the other, as others' models do.

    ``norm`` is applied once before them, or is None where the layers norm for themselves.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: RMSNorm | None) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.norm_ref = (norm,)

    def forward(
        self, x: Tensor, delta: Tensor | None = None, gate: Tensor | None = None, activation: str = ""
    ) -> tuple[list[Tensor], Tensor]:
        """As :meth:`SharedInput.forward`, with plain operations."""
        if gate is not None:
            x = gated(gate, x, activation)
        x = residual_sum(x, delta)
        norm = self.norm_ref[0]
        read = x if norm is None else norm(x)
        return [layer(read) for layer in self.layers], x


# (module that owns the SharedInput, its attribute, the attributes of its layers) within a block
_PLACES = (
    ("self_attn", "qkv", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", "out", ("o_proj",)),
    ("mlp", "gate_up", ("gate_proj", "up_proj")),
    ("mlp", "down", ("down_proj",)),
)

# (full name of the layer, the layer, the norm before it) -> what takes its place
Replace = Callable[[str, nn.Linear, RMSNorm | None], nn.Module]


def replace_linears(decoder: Decoder, replace: Replace, norm_outside: bool) -> Decoder:
    """Put ``replace(name, layer, norm)`` where each linear layer of the blocks is; the decoder, changed in place.

    ``norm_outside``: the norm is applied before the layers; otherwise the replacements apply it themselves.
    """
    for number, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        for owner_name, shared_name, names in _PLACES:
            owner: Any = getattr(block, owner_name)
            shared = getattr(owner, shared_name)
            assert isinstance(shared, SharedInput)
            norm = shared.norm_ref[0]
            for name in names:
                full = f"layers.{number}.{owner_name}.{name}"
                setattr(owner, name, replace(full, getattr(owner, name), norm))
            layers = [getattr(owner, name) for name in names]
            setattr(owner, shared_name, LayerByLayer(layers, norm if norm_outside else None))
    return decoder


def textbook(decoder: Decoder, quantised: set[str]) -> Decoder:
    """A decoder of float layers, with textbook layers where ``quantised`` names one (``layers.0.self_attn.q_proj``)."""

    def replace(name: str, layer: nn.Linear, norm: RMSNorm | None) -> nn.Module:
        return TextbookBitLinear(layer.weight, norm) if name in quantised else _NormedLinear(layer, norm)

    return replace_linears(decoder, replace, norm_outside=False)


class _NormedLinear(nn.Module):
    """A float layer among textbook layers, with its norm."""

    def __init__(self, layer: nn.Linear, norm: RMSNorm | None) -> None:
        super().__init__()
        self.weight = layer.weight
        self.norm_ref = (norm,)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm_ref[0]
        result: Tensor = F.linear(x if norm is None else norm(x), self.weight)
        return result


def linear_names(decoder: Decoder) -> set[str]:
    """Full names of the linear layers of the blocks."""
    return {name for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and name.startswith("layers.")}
