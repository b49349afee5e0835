"""The gate of a gated FFN, ``activation(gate) * up``, as part of the op that reads it: nothing of it is kept."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``silu(gate) * up`` or, for ``relu2``, ``relu(gate)^2 * up`` (Primer, arXiv 2109.08668), in the type of up."""
    return (F.silu(gate) if activation == "silu" else F.relu(gate).square()) * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, in their types, computed in at least float32."""
    wide = torch.promote_types(up.dtype, torch.float32)
    grad, g, u = grad.to(wide), gate.to(wide), up.to(wide)
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        value, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    else:
        relu = F.relu(g)
        value, slope = relu * relu, 2 * relu
    return (grad * u * slope).to(gate.dtype), (grad * value).to(up.dtype)
