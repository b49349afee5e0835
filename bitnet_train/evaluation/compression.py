"""What general-purpose compressors make of a text: the yardstick beside a model's bits per byte."""

import gzip
import lzma
from collections.abc import Callable

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "xz -9": lambda text: lzma.compress(text, preset=9),
}


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte that each of :data:`COMPRESSORS` needs for ``text``. Raises ValueError for an empty text."""
    if not text:
        raise ValueError("an empty text has no bits per byte")
    return {name: 8 * len(compress(text)) / len(text) for name, compress in COMPRESSORS.items()}
