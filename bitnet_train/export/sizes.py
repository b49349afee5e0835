"""What an export takes, part by part."""

import math
from dataclasses import dataclass

# Bits that a ternary code needs at least: log2(3).
IDEAL_BITS = math.log2(3)


@dataclass(frozen=True)
class ExportSize:
    """Bytes of an export's tensors: in all, of codes with their scales, of embedding and head; and how many codes."""

    total_bytes: int
    code_bytes: int
    embedding_bytes: int
    code_weights: int

    @property
    def bits_per_code(self) -> float:
        """Bits of storage per quantised weight, scales included."""
        return 8 * self.code_bytes / max(1, self.code_weights)

    @property
    def over_ideal(self) -> float:
        """How many times the ideal 1.58 bits per weight that is."""
        return self.bits_per_code / IDEAL_BITS
