"""Faults to plant in a GGUF file: each a function that changes it, taken apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from bitnet_train.errors import VerificationError
from tests.export.conftest import MakeExport
from tests.export.gguf.raw import RawGguf, RawTensor, edit_gguf

Edit = Callable[[RawGguf], None]
UP, QUERY, KEY = "blk.1.ffn_up.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"
EMBEDDING, NORM = "token_embd.weight", "output_norm.weight"
EPS, BASE = "{arch}.attention.layer_norm_rms_epsilon", "{arch}.rope.freq_base"
READ = "perplexity of what was read"
# Two ids of words that every text has.
COMMON = (260, 274)


class Fault(NamedTuple):
    """A kind of model, what is planted, and the checks that must fail."""

    kind: str
    edit: Edit
    checks: set[str]


def put(key: str, value: Any) -> Edit:
    """Another value of a key, which may name the architecture as ``{arch}``."""

    def edit(raw: RawGguf) -> None:
        name = full_key(raw, key)
        assert raw.metadata.get(name) != value
        raw.metadata[name] = value

    return edit


def drop(key: str) -> Edit:
    return lambda raw: raw.metadata.pop(full_key(raw, key))


def full_key(raw: RawGguf, key: str) -> str:
    return key.replace("{arch}", raw.metadata["general.architecture"])


def swap_items(key: str, first: int, second: int) -> Edit:
    """Two items of a list in each other's place."""

    def edit(raw: RawGguf) -> None:
        items = raw.metadata[key]
        items[first], items[second] = items[second], items[first]

    return edit


def swap_data(first: str, second: str) -> Edit:
    """The bytes of two tensors in each other's place."""

    def edit(raw: RawGguf) -> None:
        a, b = raw.tensors[first], raw.tensors[second]
        assert len(a.data) == len(b.data)
        a.data, b.data = b.data, a.data

    return edit


def other_code(name: str) -> Edit:
    """The first code of a tensor of 2-bit codes as another of the three."""

    def edit(raw: RawGguf) -> None:
        data = raw.tensors[name].data
        data[0] += 1 if data[0] & 3 < 2 else -1

    return edit


def other_digit(name: str) -> Edit:
    """The first byte of a TQ1_0 tensor one step on, which is another last digit."""

    def edit(raw: RawGguf) -> None:
        data = raw.tensors[name].data
        value = (data[0] * 243) >> 8
        data[0] = ((value + (1 if value % 3 < 2 else -1)) * 256 + 242) // 243

    return edit


def times(name: str, start: int, dtype: str, factor: float, count: int = 1) -> Edit:
    """Numbers of a tensor's bytes multiplied."""

    def edit(raw: RawGguf) -> None:
        values = np.frombuffer(raw.tensors[name].data, dtype=dtype, offset=start, count=count)
        raw.tensors[name].data[start : start + values.nbytes] = (values * np.dtype(dtype).type(factor)).tobytes()

    return edit


def scale_of_i2_s(name: str) -> Edit:
    """The scale behind the codes, off by a millionth."""

    def edit(raw: RawGguf) -> None:
        tensor = raw.tensors[name]
        times(name, int(np.prod(tensor.shape)) // 4, "<f4", 1.000001)(raw)

    return edit


def without_tensor(name: str) -> Edit:
    return lambda raw: raw.tensors.pop(name)


def with_tensor(raw: RawGguf) -> None:
    raw.tensors["blk.0.attn_q.bias"] = RawTensor(0, (128,), bytearray(512))


def norms_as_float16(raw: RawGguf) -> None:
    tensor = raw.tensors[NORM]
    halves = np.frombuffer(tensor.data, dtype="<f4", count=tensor.shape[0]).astype("<f2").tobytes()
    raw.tensors[NORM] = RawTensor(1, tensor.shape, bytearray(halves + bytes(-len(halves) % 32)))


def rolled_embedding(raw: RawGguf) -> None:
    """Every token in the row of the next one."""
    row = 2 * raw.tensors[EMBEDDING].shape[1]
    data = raw.tensors[EMBEDDING].data
    raw.tensors[EMBEDDING].data = data[row:] + data[:row]


def rows_as_trained(raw: RawGguf) -> None:
    """Rows of q in the order of rotated halves, as if nobody had permuted them."""
    tensor = raw.tensors[QUERY]
    rows = np.frombuffer(bytes(tensor.data), dtype=np.uint8).reshape(tensor.shape[0], -1)
    halves = rows.reshape(4, -1, 2, rows.shape[1]).swapaxes(1, 2)
    tensor.data = bytearray(halves.tobytes())


def rejected(format_name: str, fault: Fault, exported: MakeExport, folder: Path) -> None:
    """A copy of the export with the fault fails the verification, in all the checks that the fault names."""
    export = exported(fault.kind, format_name).copy(folder)
    (path,) = export.folder.glob("*.gguf")
    arch = RawGguf.read(path).metadata["general.architecture"]
    edit_gguf(export.folder, fault.edit)
    report = export.verify()
    assert {check.name for check in report.failed} >= {name.replace("{arch}", arch) for name in fault.checks}
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)
