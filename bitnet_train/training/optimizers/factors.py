"""Factors of the rates by a parameter's name: blocks, patterns, depth. Plain arithmetic, no torch."""

import re
from fnmatch import fnmatchcase

# The number of the block that a parameter belongs to stands in its name.
BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|blocks)\.(\d+)\.")
# What is below all blocks: embeddings, and the first layers and positions of image classifiers.
EMBEDDING = re.compile(r"(?:^|[._])embed|^(?:positions|input_proj)\.")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is of the parameter called ``name``, or of the layer that owns it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def block_number(name: str) -> int | None:
    """The block of the parameter called ``name``; None outside the blocks."""
    found = BLOCK.search(name)
    return None if found is None else int(found[1])


def depth_factor(decay: float, name: str, blocks: int) -> float:
    """Factor of the learning rate by depth: ``decay`` to the power of the number of blocks above.

    Of ``blocks``, the last has power 0, the first ``blocks - 1``; embeddings and the like have ``blocks``, what follows
    them all 0.
    """
    number = block_number(name)
    if number is None:
        return decay**blocks if EMBEDDING.search(name) else 1.0
    return decay ** (blocks - 1 - number)
