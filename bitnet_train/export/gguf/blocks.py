"""Sizes of ggml's blocks, and its numbers, for what is answered from the configuration alone: nothing heavy here."""

import struct

# Weights that share a scale in llama.cpp's ternary types and in K-quants.
BLOCK = 256
TQ2_0_BYTES = 66
TQ1_0_BYTES = 54
Q6_K_BYTES = 210
# Weights that I2_S interleaves, and what follows the codes: a float32 scale, padded.
I2_S_BLOCK = 128
I2_S_TAIL = 32
# Digits that tell any two float32 apart.
FLOAT32_DIGITS = 9
LARGEST_FLOAT32 = 3.4028234663852886e38


def as_float32(value: float) -> float:
    """The number with the fewest decimal digits that is the same float32: what someone typed before it was stored."""
    stored = struct.pack("<f", value)
    for digits in range(1, FLOAT32_DIGITS):
        short = float(f"{value:.{digits}g}")
        # The largest float32 rounds up to what is none.
        if abs(short) <= LARGEST_FLOAT32 and struct.pack("<f", short) == stored:
            return short
    return float(f"{value:.{FLOAT32_DIGITS}g}")
