"""The Hadamard transform of a layer's inputs, which spreads outliers over all channels before they are quantised."""

from functools import cache

import torch
from torch import Tensor

# Longest block that is multiplied as one matrix; a longer one is the Kronecker product of two.
LONGEST_DENSE = 128


def hadamard_block(width: int) -> int:
    """The largest power of two that divides ``width``: the size of the blocks that :func:`rotate` mixes."""
    return width & -width


def hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """The orthonormal symmetric Hadamard matrix (size, size) in float32, ``size`` a power of two (Sylvester)."""
    # Dynamo does not look into caches, and warns of them.
    return _matrix(size, device) if torch.compiler.is_compiling() else _kept_matrix(size, device)


def _matrix(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


# Not inference_mode, even inside one: the matrix is saved for the backward of later steps.
_kept_matrix = cache(torch.inference_mode(False)(_matrix))


def rotate(x: Tensor) -> Tensor:
    """``x @ H`` in float32 for x (..., K), with H orthonormal, symmetric and its own inverse.

    H is block-diagonal: Hadamard matrices of the largest power of two that divides K, as BitNet v2's H-BitLinear
    (arXiv 2504.18415, equation 3) does for widths that are powers of two. An odd K is left as it is. Differentiable;
    the gradient is rotated back the same way.
    """
    block = hadamard_block(x.shape[-1])
    if block == 1:
        return x.float()
    with torch.autocast(x.device.type, enabled=False):
        if block <= LONGEST_DENSE:
            return (x.float().unflatten(-1, (-1, block)) @ hadamard_matrix(block, x.device)).flatten(-2)
        outer = block // LONGEST_DENSE
        if outer > LONGEST_DENSE:
            raise ValueError(f"a block of {block} channels is longer than {LONGEST_DENSE**2}")
        blocks = x.float().unflatten(-1, (-1, outer, LONGEST_DENSE))
        mixed = blocks @ hadamard_matrix(LONGEST_DENSE, x.device)
        return (hadamard_matrix(outer, x.device) @ mixed).flatten(-3)
