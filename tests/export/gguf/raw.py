"""GGUF files taken apart and put together again by the specification (ggml, docs/gguf.md), to plant faults in them."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_train.export.gguf.file import GgufFile

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
ALIGNMENT = 32


@dataclass
class RawTensor:
    """Type id, shape with the contiguous dimension last, and the bytes up to the next tensor."""

    type: int
    shape: tuple[int, ...]
    data: bytearray


@dataclass
class RawGguf:
    """What a file holds: metadata and tensors in order."""

    metadata: dict[str, Any]
    tensors: dict[str, RawTensor]

    @classmethod
    def read(cls, path: Path) -> "RawGguf":
        """The content of a file whose tensors lie in their order."""
        file, content = GgufFile(path), path.read_bytes()
        starts = [tensor.start for tensor in file.tensors.values()]
        assert starts == sorted(starts)
        ends = [*starts[1:], len(content)]
        tensors = {
            name: RawTensor(tensor.type, tensor.shape, bytearray(content[tensor.start : end]))
            for (name, tensor), end in zip(file.tensors.items(), ends, strict=True)
        }
        return cls(file.metadata, tensors)

    def save(self, path: Path) -> None:
        """Write it, integers as uint32 and floats as float32."""
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))]
        for key, value in self.metadata.items():
            parts += [string(key), typed(value)]
        at = 0
        for name, tensor in self.tensors.items():
            parts.append(string(name) + struct.pack("<I", len(tensor.shape)))
            parts.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
            parts.append(struct.pack("<IQ", tensor.type, at))
            at += len(tensor.data)
        header = b"".join(parts)
        header += bytes(-len(header) % ALIGNMENT)
        path.write_bytes(header + b"".join(bytes(tensor.data) for tensor in self.tensors.values()))


def string(text: str) -> bytes:
    """A string as the format stores it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def typed(value: Any) -> bytes:
    """A metadata value behind its type."""
    kind, stored = _stored(value)
    return struct.pack("<I", kind) + stored


def _stored(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, string(value)
    # Token types are the one array of integers, and int32 in llama.cpp's own files.
    items = [(5, struct.pack("<i", v)) if type(v) is int else _stored(v) for v in value]
    kind = items[0][0] if items else STRING
    return ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(item for _, item in items)


def edit_gguf(folder: Path, edit: Callable[[RawGguf], None]) -> None:
    """Change the GGUF file of a folder in place."""
    (path,) = folder.glob("*.gguf")
    raw = RawGguf.read(path)
    edit(raw)
    raw.save(path)
