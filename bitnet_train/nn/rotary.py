"""Rotary position embeddings (arXiv 2104.09864) in the rotate-half form of LLaMA and BitNet."""

import torch
from torch import Tensor


def rotary_table(head_dim: int, context: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (context, head_dim), of ``p / theta^(2i/d)`` for position p, frequency i; repeated twice."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def negate_first_half(sin: Tensor) -> Tensor:
    """The sines as :func:`rotate` wants them."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotates x (batch, heads, tokens, head_dim), in float32; keeps the type of x.

    cos (tokens, head_dim), or with more dimensions that broadcast, is from :func:`rotary_table`, signed_sin from
    :func:`negate_first_half`.
    """
    # (first, second) -> (-second, first) as a flip with signed sines: a concatenation compiles to element-wise code.
    halves, cos, sin = (t.unflatten(-1, (2, -1)) for t in (x, cos, signed_sin))
    rotated = halves.float() * cos + halves.flip(-2).float() * sin
    return rotated.to(x.dtype).flatten(-2)
