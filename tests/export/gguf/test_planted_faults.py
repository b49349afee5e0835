"""Verification rejects every fault planted in a GGUF file; those that llama.cpp finds are in test_llama_cpp.py."""

from pathlib import Path

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.export.gguf import llama_cpp_child
from tests.export.conftest import MakeExport, MakeRun
from tests.export.gguf.planting import (
    BASE,
    COMMON,
    EMBEDDING,
    EPS,
    KEY,
    NORM,
    QUERY,
    READ,
    UP,
    Fault,
    drop,
    norms_as_float16,
    other_code,
    other_digit,
    put,
    rejected,
    rolled_embedding,
    scale_of_i2_s,
    swap_data,
    swap_items,
    times,
    with_tensor,
    without_tensor,
)

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
# Found by readers, whatever llama.cpp makes of the file.
MAIN_LINE: dict[str, tuple[str, Fault]] = {
    "one code": ("gguf-tq2_0", Fault("wide silu", other_code(UP), {"codes"})),
    "one digit": ("gguf-tq1_0", Fault("wide silu", other_digit(UP), {"codes"})),
    "scale of one block": ("gguf-tq2_0", Fault("wide silu", times(UP, 64, "<f2", 1.01), {"scales"})),
    "scale of one block, base three": ("gguf-tq1_0", Fault("wide silu", times(UP, 52, "<f2", 1.01), {"scales"})),
    "a scale that is not positive": ("gguf-tq2_0", Fault("wide silu", times(UP, 64, "<f2", -1), {"loads"})),
}  # fmt: skip


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
