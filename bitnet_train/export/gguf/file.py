"""Reading GGUF files, I2_S included, which gguf-py does not know: header, metadata and a map of the tensors' bytes.

Every count and offset is held against the file's size before anything is allocated: the file may come from anywhere.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from bitnet_train.errors import ConfigError

MAGIC = b"GGUF"
# Value types of the specification (ggml, docs/gguf.md): id -> struct format.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT_KEY = "general.alignment"
# No key or tensor has a longer name.
LONGEST_NAME = 256
# Dimensions that a tensor has at most in ggml.
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Type id, shape (the last dimension contiguous) and the first byte of a tensor's data in the file."""

    type: int
    shape: tuple[int, ...]
    start: int


class GgufFile:
    """An opened GGUF file of version 3, little endian.

    Attributes:
        metadata: key -> number, string or list.
        tensors: name -> where it is.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is missing, truncated, of another kind, or contradicts itself."""
        self.path = path
        try:
            self._bytes: np.ndarray = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}).") from None
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise self.damaged(str(error)) from None

    def data(self, name: str, size: int) -> np.ndarray:
        """``size`` bytes of a tensor, uint8, still in the file. Raises ConfigError when the file ends before."""
        start = self.tensors[name].start
        if start + size > len(self._bytes):
            raise self.damaged(f"{name} ends behind the end of the file")
        return self._bytes[start : start + size]

    def damaged(self, reason: str) -> ConfigError:
        """The error to raise for this file."""
        return ConfigError(f"{self.path} is damaged or no GGUF file ({reason}): export again.")

    def _read_header(self) -> None:
        if bytes(self._bytes[:4]) != MAGIC:
            raise self.damaged("it does not begin with GGUF")
        self._at = 4
        version, tensors, keys = self._take("<I"), self._take("<Q"), self._take("<Q")
        if version != 3:
            raise self.damaged(f"version {version}; only version 3, little endian, is read here")
        if (tensors + keys) * 12 > len(self._bytes):
            raise self.damaged(f"{tensors:,} tensors and {keys:,} keys do not fit into it")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            self.metadata[key] = self._value(self._take("<I"), key)
        alignment = self.metadata.get(ALIGNMENT_KEY, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise self.damaged(f"{ALIGNMENT_KEY} is {short_repr(alignment)}")
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name, count = self._name(), self._take("<I")
            if not 1 <= count <= MOST_DIMENSIONS:
                raise self.damaged(f"{name} has {count} dimensions")
            shape = tuple(reversed([self._take("<Q") for _ in range(count)]))
            kind, offset = self._take("<I"), self._take("<Q")
            if name in found or prod(shape) > 8 * len(self._bytes) or not prod(shape):
                raise self.damaged(f"{name} is there twice or has the impossible shape {shape}")
            found[name] = (kind, shape, offset)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: StoredTensor(kind, shape, start + at) for name, (kind, shape, at) in found.items()}
        for name, tensor in self.tensors.items():
            if tensor.start >= len(self._bytes):
                raise self.damaged(f"{name} begins behind the end of the file")

    def _take(self, layout: str) -> Any:
        size = struct.calcsize(layout)
        value = struct.unpack(layout, self._bytes[self._at : self._at + size].tobytes())[0]
        self._at += size
        return value

    def _name(self) -> str:
        name = self._string()
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise self.damaged("it has a name that is none")
        return name

    def _string(self) -> str:
        size = self._take("<Q")
        if self._at + size > len(self._bytes):
            raise self.damaged("a string ends behind the end of the file")
        text = self._bytes[self._at : self._at + size].tobytes()
        self._at += size
        return text.decode("utf-8")

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string()
        if kind in NUMBERS:
            return self._take(f"<{NUMBERS[kind]}")
        if kind != ARRAY:
            raise self.damaged(f"{key} has the unknown type {kind}")
        item, count = self._take("<I"), self._take("<Q")
        if item in NUMBERS:
            size = struct.calcsize(f"<{NUMBERS[item]}") * count
            if self._at + size > len(self._bytes):
                raise self.damaged(f"{key} ends behind the end of the file")
            values = np.frombuffer(self._bytes[self._at : self._at + size].tobytes(), dtype=f"<{NUMBERS[item]}")
            self._at += size
            return values.tolist()
        if item != STRING or count * 8 > len(self._bytes):
            raise self.damaged(f"{key} holds {count:,} values of type {item}")
        return [self._string() for _ in range(count)]
