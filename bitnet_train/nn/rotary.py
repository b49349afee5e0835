"""Rotary position embeddings (arXiv 2104.09864) in the rotate-half form of LLaMA and BitNet."""

import torch
from torch import Tensor


def rotary_table(head_dim: int, context: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (context, head_dim), of ``p / theta^(2i/d)`` for position p, frequency i; repeated twice.

    The first half of sin is negative, so that :func:`rotate` need not negate.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies
    sin = angles.sin()
    return torch.cat((angles, angles), dim=-1).cos(), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (batch, heads, tokens, head_dim) by cos and sin (tokens, head_dim), in float32; keeps the type of x."""
    # The halves are exchanged by a flip: compiled, a concatenation would be computed element by element.
    halves, cos, sin = (t.unflatten(-1, (2, -1)) for t in (x, cos, sin))
    rotated = halves.float() * cos + halves.flip(-2).float() * sin
    return rotated.to(x.dtype).flatten(-2)
