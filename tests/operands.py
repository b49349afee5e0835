"""Shapes and inputs that the tests of the op share."""

import torch
from torch import Tensor

EPS = 1e-5
# Tokens, inputs, outputs: ones, primes, sizes that no tile divides, few tokens with many outputs, and the reverse.
ODD_SHAPES = [
    (1, 1, 1),
    (1, 3, 17),
    (3, 17, 1),
    (17, 1, 3),
    (3, 3, 3),
    (7, 13, 19),
    (32, 64, 48),
    (5, 257, 31),
    (33, 130, 127),
    (7, 64, 700),
    (200, 12, 66),
]


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, as activations have."""
    x = torch.randn(*shape)
    return (x * torch.logspace(-2, 2, x[..., 0].numel()).reshape(*shape[:-1], 1)).to(dtype)
