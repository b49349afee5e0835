import gzip
import lzma

import pytest

from bitnet_train.evaluation.compression import compressed_bits_per_byte


def test_bits_per_byte_of_the_compressors() -> None:
    text = b"one two three " * 50
    bits = compressed_bits_per_byte(text)
    assert bits == {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def test_an_empty_text_has_none() -> None:
    with pytest.raises(ValueError, match="empty"):
        compressed_bits_per_byte(b"")
