"""Writing a safetensors file tensor by tensor, so that the file never has to fit into memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

# The names that safetensors gives to number types (its format.md).
TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


class TensorInfo(NamedTuple):
    """Type and shape of a tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFileWriter:
    """A context manager that lays out ``infos`` in a new safetensors file, then takes the tensors in any order.

    The layout is that of the library: eight bytes of header length, the JSON header padded with spaces to a multiple of
    eight, the data without gaps, wider types first so that every tensor is aligned. Leaving the context without having
    written every tensor raises ValueError.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.infos = dict(infos)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, info in sorted(self.infos.items(), key=lambda item: -item[1].dtype.itemsize):
            self._offsets[name] = end
            span = [end, end + info.bytes]
            header[name] = {"dtype": TYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
            end += info.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(self.infos)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._stream.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Raises ValueError when its type or shape is not the announced one."""
        if TensorInfo(tensor.dtype, tuple(tensor.shape)) != self.infos[name]:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {self.infos[name]}")
        self._stream.seek(self._start + self._offsets[name])
        self._stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, among them {min(self._missing)}")
