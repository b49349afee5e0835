"""Rotary position embeddings (arXiv 2104.09864) in the rotate-half form of LLaMA and BitNet."""

import torch
from torch import Tensor


def rotary_table(head_dim: int, context: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (context, head_dim), of ``p / theta^(2i/d)`` for position p, frequency i; repeated twice."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (batch, heads, tokens, head_dim) by cos and sin (tokens, head_dim), in float32; keeps the type of x."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)
