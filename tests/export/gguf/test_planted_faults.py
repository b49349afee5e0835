"""Verification rejects every fault planted in a GGUF file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from bitnet_train.errors import ConfigError, VerificationError
from bitnet_train.export.gguf import llama_cpp_child
from bitnet_train.export.gguf.llama_cpp_child import ask_llama_cpp
from tests.export.conftest import MakeExport, MakeRun
from tests.export.gguf.raw import RawGguf, RawTensor, edit_gguf

Edit = Callable[[RawGguf], None]
UP, QUERY, KEY = "blk.1.ffn_up.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"
EMBEDDING, NORM = "token_embd.weight", "output_norm.weight"
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


EPS, BASE = "{arch}.attention.layer_norm_rms_epsilon", "{arch}.rope.freq_base"
READ = "perplexity of what was read"
I2_S: dict[str, Fault] = {
    "one code": Fault("half wide 2b4t", other_code(UP), {"codes"}),
    "one scale": Fault("half wide 2b4t", scale_of_i2_s(UP), {"scales"}),
    "q and k swapped": Fault("half wide 2b4t", swap_data(QUERY, KEY), {"codes", "scales"}),
    "gate and up swapped": Fault("half wide silu", swap_data(UP, "blk.1.ffn_gate.weight"), {"codes", "scales", READ}),
    "blocks swapped": Fault("half wide llama", swap_data(UP, "blk.0.ffn_up.weight"), {"codes", "scales", READ}),
    "norm eps": Fault("half wide 2b4t", put(EPS, 1e-6), {f"config: {EPS}", "config: model"}),
    "rope base": Fault("half wide 2b4t", put(BASE, 1e2), {f"config: {BASE}", "config: model"}),
    "context": Fault("half wide 2b4t", put("{arch}.context_length", 64), {"config: {arch}.context_length"}),
    "no context": Fault("half wide 2b4t", drop("{arch}.context_length"), {"config: {arch}.context_length", "loads"}),
    "no eps": Fault("half wide 2b4t", drop(EPS), {f"config: {EPS}", "loads"}),
    "heads": Fault("half wide 2b4t", put("{arch}.attention.head_count", 2), {"config: {arch}.attention.head_count"}),
    "vocabulary": Fault("half wide 2b4t", put("{arch}.vocab_size", 400), {"config: {arch}.vocab_size", "loads"}),
    "architecture": Fault("half wide 2b4t", put("general.architecture", "bitnet"), {"config: general.architecture"}),
    "file type": Fault("half wide 2b4t", put("general.file_type", 37), {"config: general.file_type"}),
    "name": Fault("half wide 2b4t", put("general.name", "large"), {"config: general.name"}),
    "another key": Fault("half wide 2b4t", put("general.author", "x"), {"config: general.author"}),
    "pre-tokenizer": Fault(
        "half wide 2b4t",
        put("tokenizer.ggml.pre", "llama-bpe"),
        {"config: tokenizer.ggml.pre", "token ids of held-out text"},
    ),
    "unknown pre-tokenizer": Fault(
        "half wide 2b4t", put("tokenizer.ggml.pre", "default"), {"config: tokenizer.ggml.pre", "tokenizer"}
    ),
    "no bos": Fault(
        "half wide 2b4t", drop("tokenizer.ggml.bos_token_id"), {"config: tokenizer.ggml.bos_token_id", "tokenizer"}
    ),
    "another bos": Fault(
        "half wide 2b4t",
        put("tokenizer.ggml.bos_token_id", 5),
        {"config: tokenizer.ggml.bos_token_id", "config: tokenizer.bos_id"},
    ),
    "bos not added": Fault(
        "half wide 2b4t", put("tokenizer.ggml.add_bos_token", False), {"config: tokenizer.ggml.add_bos_token"}
    ),
    "tokens swapped": Fault(
        "half wide 2b4t",
        swap_items("tokenizer.ggml.tokens", *COMMON),
        {"config: tokenizer.ggml.tokens", "token ids of held-out text"},
    ),
    "merges swapped": Fault(
        "half wide 2b4t", swap_items("tokenizer.ggml.merges", 0, 9), {"config: tokenizer.ggml.merges"}
    ),
    "embedding row": Fault("half wide 2b4t", times(EMBEDDING, 512, "<f2", 1.01, 4), {"unquantised tensors"}),
    "embedding moved": Fault("half wide 2b4t", rolled_embedding, {"unquantised tensors", READ}),
    "norm": Fault("half wide 2b4t", times(NORM, 0, "<f4", 1.0001), {"unquantised tensors"}),
    "head": Fault("half wide llama", times("output.weight", 0, "<f2", 1.01), {"unquantised tensors"}),
    "float layer": Fault("half wide mixed", times("blk.0.ffn_up.weight", 0, "<f4", 1.001), {"unquantised tensors"}),
    "norm in float16": Fault("half wide 2b4t", norms_as_float16, {"types of tensors"}),
    "missing tensor": Fault("half wide 2b4t", without_tensor(UP), {"loads", "types of tensors"}),
    "unknown tensor": Fault("half wide 2b4t", with_tensor, {"loads"}),
}  # fmt: skip
# Each of these is found by readers, and llama.cpp runs the file all the same, or says why not.
MAIN_LINE: dict[str, tuple[str, Fault]] = {
    "one code": ("gguf-tq2_0", Fault("wide silu", other_code(UP), {"codes"})),
    "one digit": ("gguf-tq1_0", Fault("wide silu", other_digit(UP), {"codes"})),
    "scale of one block": ("gguf-tq2_0", Fault("wide silu", times(UP, 64, "<f2", 1.01), {"scales"})),
    "scale of one block, base three": ("gguf-tq1_0", Fault("wide silu", times(UP, 52, "<f2", 1.01), {"scales"})),
    "a scale that is not positive": ("gguf-tq2_0", Fault("wide silu", times(UP, 64, "<f2", -1), {"loads"})),
    "q as it was trained": ("gguf-tq2_0", Fault("wide llama", rows_as_trained, {"codes", "held-out perplexity"})),
    "embedding moved": ("gguf-tq2_0", Fault("wide silu", rolled_embedding, {"held-out perplexity", READ})),
    "rope base": ("gguf-tq2_0", Fault("wide llama", put(BASE, 1e2), {f"config: {BASE}", "held-out perplexity"})),
    "pre-tokenizer": (
        "gguf-tq2_0", Fault("wide silu", put("tokenizer.ggml.pre", "llama-bpe"), {"token ids of held-out text"}),
    ),
    "bos not added": (
        "gguf-tq2_0", Fault("wide silu", put("tokenizer.ggml.add_bos_token", False), {"special tokens added"}),
    ),
    "tokens swapped": (
        "gguf-tq2_0",
        Fault("wide silu", swap_items("tokenizer.ggml.tokens", *COMMON), {"token ids of held-out text"}),
    ),
    "no kind of tokenizer": (
        "gguf-tq2_0",
        Fault("wide silu", drop("tokenizer.ggml.model"), {"config: tokenizer.ggml.model", "runs in llama.cpp"}),
    ),
    "no eps": ("gguf-tq2_0", Fault("wide silu", drop(EPS), {"loads", "runs in llama.cpp"})),
    "missing tensor": ("gguf-tq1_0", Fault("wide silu", without_tensor(UP), {"loads", "runs in llama.cpp"})),
    "unknown architecture": (
        "gguf-tq2_0", Fault("wide silu", put("general.architecture", "nonsense"), {"loads", "runs in llama.cpp"}),
    ),
}  # fmt: skip


def rejected(format_name: str, fault: Fault, exported: MakeExport, folder: Path) -> None:
    export = exported(fault.kind, format_name).copy(folder)
    (path,) = export.folder.glob("*.gguf")
    arch = RawGguf.read(path).metadata["general.architecture"]
    edit_gguf(export.folder, fault.edit)
    report = export.verify()
    assert {check.name for check in report.failed} >= {name.replace("{arch}", arch) for name in fault.checks}
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", I2_S)
def test_a_fault_in_i2_s_is_rejected(name: str, exported: MakeExport, tmp_path: Path) -> None:
    rejected("gguf-i2_s", I2_S[name], exported, tmp_path / "copy")


@pytest.mark.parametrize("name", MAIN_LINE)
def test_a_fault_in_a_main_line_file_is_rejected(name: str, exported: MakeExport, tmp_path: Path) -> None:
    format_name, fault = MAIN_LINE[name]
    rejected(format_name, fault, exported, tmp_path / "copy")


@pytest.mark.parametrize("format_name", ["gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s"])
@pytest.mark.parametrize("keep", [0, 3, 100, -1000])
def test_a_truncated_file_is_rejected(format_name: str, keep: int, exported: MakeExport, tmp_path: Path) -> None:
    export = exported("wide silu", format_name).copy(tmp_path / "copy")
    (path,) = export.folder.glob("*.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    failed = {check.name for check in export.verify().failed}
    assert failed >= {"loads"} | ({"runs in llama.cpp"} if format_name != "gguf-i2_s" else set())


@pytest.mark.parametrize(
    ("there", "run"),
    [("wide mixed", "wide llama"), ("wide llama", "wide mixed"), ("wide silu", "wide llama"), ("wide silu", "2b4t")],
)
def test_the_export_of_another_run_is_rejected(
    there: str, run: str, exported: MakeExport, small_run: MakeRun, tmp_path: Path
) -> None:
    export = exported(there, "gguf-i2_s").copy(tmp_path / "copy")
    assert small_run(run).verify(export.folder, "gguf-i2_s").failed


def test_what_llama_cpp_says_about_a_file_it_cannot_load_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"no file of its kind")
    with pytest.raises(RuntimeError, match=r"llama.cpp ended with exit code \d+: .*Failed to load model") as caught:
        ask_llama_cpp(path, [[0, 1]], ["a"], "a", 2)
    assert "\n" not in str(caught.value)


def test_a_consumer_that_aborts_is_a_failed_check(
    exported: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os; os.abort()")
    monkeypatch.setattr(llama_cpp_child, "__file__", str(child))
    report = exported("wide silu", "gguf-tq2_0").copy(tmp_path / "copy").verify()
    (failed,) = report.failed
    assert failed.name == "runs in llama.cpp"
    assert "llama.cpp ended with signal 6" in failed.measured


@pytest.mark.parametrize("format_name", ["gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s"])
def test_a_file_that_does_not_exist(format_name: str, small_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gguf does not exist: export first"):
        small_run("wide silu").verify(tmp_path, format_name)
