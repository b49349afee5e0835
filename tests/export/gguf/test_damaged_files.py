"""Reading a damaged GGUF file: one sentence each, before anything is allocated for invented counts."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from bitnet_train.errors import ConfigError
from bitnet_train.export.gguf import reader
from bitnet_train.export.gguf.file import GgufFile
from bitnet_train.export.gguf.reader import load_gguf
from tests.export.conftest import MakeExport
from tests.export.gguf.raw import FLOAT32, RawGguf, RawTensor, edit_gguf, string, typed
from tests.export.hostile import refused

UP, EMBEDDING, NORM = "blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"
HUGE = 2**63 + 5
FORMATS = {"gguf-i2_s": "half wide 2b4t", "gguf-tq2_0": "wide silu", "gguf-tq1_0": "wide llama"}
every_format = pytest.mark.parametrize("format_name", FORMATS)


@pytest.fixture
def export(exported: MakeExport, tmp_path: Path) -> Path:
    return exported("half wide 2b4t", "gguf-i2_s").copy(tmp_path / "export").folder


def path_of(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def overwrite(folder: Path, at: int, content: bytes) -> None:
    with path_of(folder).open("r+b") as file:
        file.seek(at)
        file.write(content)


def overwrite_behind(folder: Path, name: str, skip: int, content: bytes) -> None:
    """Bytes some way behind a name in the header."""
    found = path_of(folder).read_bytes().index(string(name))
    overwrite(folder, found + len(string(name)) + skip, content)


def change(folder: Path, key: str, value: Any) -> None:
    def edit(raw: RawGguf) -> None:
        raw.metadata[key.replace("{arch}", raw.metadata["general.architecture"])] = value

    edit_gguf(folder, edit)


def test_a_folder_without_a_file(tmp_path: Path) -> None:
    refused(tmp_path, "holds no GGUF file", load_gguf)


def test_a_folder_in_the_place_of_the_file(export: Path) -> None:
    path = path_of(export)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        GgufFile(path)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x.gguf cannot be read"):
        GgufFile(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("at", "content", "pattern"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 2), "version 2; only version 3"),
        (4, struct.pack(">I", 3), "version 50,?331,?648; only version 3, little endian"),
        (8, struct.pack("<Q", HUGE), "do not fit into it"),
        (8, struct.pack("<Q", 2**32), "do not fit into it"),
        (8, struct.pack("<Q", 400), "damaged"),
        (16, struct.pack("<Q", HUGE), "do not fit into it"),
        (16, struct.pack("<Q", 400), "damaged"),
        (16, struct.pack("<Q", 0), "damaged"),
        (24, struct.pack("<Q", HUGE), "a string ends behind the end of the file"),
        (24, struct.pack("<Q", 2**40), "a string ends behind the end of the file"),
        (32, b"\xff\xff", "utf-8"),
        (32, b"a\nb", "a name that is none"),
    ],
)
def test_headers_that_cannot_be(at: int, content: bytes, pattern: str, export: Path) -> None:
    overwrite(export, at, content)
    refused(export, pattern)


@pytest.mark.parametrize(
    ("key", "skip", "content", "pattern"),
    [
        # Behind a key stand the type of its value and the value; for a list, the items' type and their count.
        ("general.file_type", 0, struct.pack("<I", 77), "general.file_type has the unknown type 77"),
        ("tokenizer.ggml.tokens", 4, struct.pack("<I", 99), "tokenizer.ggml.tokens holds .* values of type 99"),
        ("tokenizer.ggml.tokens", 4, struct.pack("<I", 9), "tokenizer.ggml.tokens holds .* values of type 9"),
        ("tokenizer.ggml.tokens", 8, struct.pack("<Q", HUGE), "tokenizer.ggml.tokens holds"),
        ("tokenizer.ggml.tokens", 8, struct.pack("<Q", 2**33), "tokenizer.ggml.tokens holds"),
        ("tokenizer.ggml.tokens", 8, struct.pack("<Q", 5000), "damaged"),
        ("tokenizer.ggml.scores", 8, struct.pack("<Q", HUGE), "tokenizer.ggml.scores ends behind the end"),
        ("tokenizer.ggml.scores", 8, struct.pack("<Q", 2**40), "tokenizer.ggml.scores ends behind the end"),
        ("tokenizer.ggml.token_type", 8, struct.pack("<Q", 2**61), "tokenizer.ggml.token_type ends behind"),
        # Behind a tensor's name: how many dimensions, these, its type and offset.
        (UP, 0, struct.pack("<I", 0), f"{UP} has 0 dimensions"),
        (UP, 0, struct.pack("<I", 2**31), f"{UP} has 2147483648 dimensions"),
        (UP, 4, struct.pack("<Q", HUGE), f"{UP} is there twice or has the impossible shape"),
        (UP, 4, struct.pack("<QQ", 2**32, 2**32), f"{UP} is there twice or has the impossible shape"),
        (UP, 4, struct.pack("<Q", 0), f"{UP} is there twice or has the impossible shape"),
        (UP, 4, struct.pack("<QQ", 64, 256), rf"{UP} has the shape \(256, 64\) instead of \(128, 128\)"),
        (UP, 20, struct.pack("<I", 4711), f"{UP} is of ggml's type 4711, not read here"),
        (UP, 20, struct.pack("<I", 2), f"{UP} is of ggml's type 2, not read here"),
        (UP, 24, struct.pack("<Q", HUGE), f"{UP} begins behind the end of the file"),
        (EMBEDDING, 20, struct.pack("<I", 36), f"{EMBEDDING} is i2_s; only linear layers are"),
        (NORM, 12, struct.pack("<I", 14), f"{NORM} has rows of 128 numbers"),
        (EMBEDDING, 20, struct.pack("<I", 14), f"{EMBEDDING} has rows of 128 numbers"),
        (NORM, 12, struct.pack("<I", 35), f"{NORM} is tq2_0; only linear layers are"),
    ],
)
def test_counts_shapes_and_types_that_cannot_be(
    key: str, skip: int, content: bytes, pattern: str, export: Path
) -> None:
    overwrite_behind(export, key, skip, content)
    refused(export, pattern)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("general.architecture", "qwen2", "the architecture is 'qwen2'"),
        ("general.architecture", ["bitnet"], "the architecture is"),
        ("general.architecture", 3, "the architecture is 3"),
        pytest.param("general.architecture", "x" * 10**6, "the architecture is 'xxx", id="endless"),
        ("general.architecture", "a\nb", r"the architecture is 'a\\nb'"),
        ("general.architecture", "bitnet", "embedding_length is None"),
        ("general.alignment", 0, "general.alignment is 0"),
        ("general.alignment", 2**31, "general.alignment is 2147483648"),
        ("general.alignment", "32", "general.alignment is '32'"),
        ("{arch}.embedding_length", 64, "only rotary positions over the whole head"),
        ("{arch}.feed_forward_length", 64, "has the shape"),
        ("{arch}.embedding_length", 0, "must be at least 1"),
        ("{arch}.embedding_length", 128.0, "embedding_length is 128.0, which is no int"),
        ("{arch}.embedding_length", [128], "embedding_length is .128., which is no int"),
        ("{arch}.block_count", 9_999, "too few for 9,999 blocks"),
        ("{arch}.block_count", 20, "is missing"),
        ("{arch}.block_count", 1, "is not part of its architecture"),
        ("{arch}.context_length", 2**32 - 1, "is the most that is read here"),
        ("{arch}.vocab_size", 2**32 - 1, "has the shape"),
        ("{arch}.attention.head_count", 7, "does not divide"),
        ("{arch}.attention.head_count", 8, "only rotary positions over the whole head"),
        ("{arch}.rope.dimension_count", 16, "only rotary positions over the whole head"),
        ("{arch}.rope.freq_base", float("nan"), "freq_base is nan"),
        ("{arch}.rope.freq_base", float("inf"), "freq_base is inf"),
        ("{arch}.rope.freq_base", 0.0, "must both be positive"),
        ("{arch}.attention.layer_norm_rms_epsilon", float("nan"), "epsilon is nan"),
        ("{arch}.attention.layer_norm_rms_epsilon", -1e-5, "must both be positive"),
        ("{arch}.attention.layer_norm_rms_epsilon", True, "epsilon is True, which is no float"),
        ("tokenizer.ggml.pre", "deepseek", "tokenizer is damaged or of a kind that is not read here"),
        ("tokenizer.ggml.tokens", ["a"], "tokenizer is damaged"),
        ("tokenizer.ggml.token_type", "x", "tokenizer is damaged"),
        ("tokenizer.ggml.merges", ["a b c d"], "tokenizer is damaged"),
        ("tokenizer.ggml.bos_token_id", 10**6, "tokenizer is damaged"),
        ("tokenizer.ggml.eos_token_id", 410, "tokenizer is damaged"),
        ("tokenizer.ggml.tokens", [f"t{i}" for i in range(417)], "tokenizer is damaged"),
    ],
)
def test_values_that_cannot_be(key: str, value: Any, pattern: str, export: Path) -> None:
    change(export, key, value)
    refused(export, pattern)


def test_the_largest_float32_is_a_number(export: Path) -> None:
    change(export, "{arch}.rope.freq_base", 3.4028234663852886e38)
    assert load_gguf(export)[0].cfg.rope_theta == pytest.approx(3.4028235e38)


def test_a_tensor_that_is_there_twice(export: Path) -> None:
    overwrite_behind(export, "blk.0.attn_q.weight", -8, b"k")
    refused(export, "blk.0.attn_k.weight is there twice")


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.2.attn_q.weight", "output.scale"])
def test_superfluous_tensor(name: str, export: Path) -> None:
    edit_gguf(export, lambda raw: raw.tensors.update({name: RawTensor(0, (128,), bytearray(512))}))
    refused(export, f"{name} is not part of its architecture")


def test_missing_tensor(export: Path) -> None:
    edit_gguf(export, lambda raw: raw.tensors.pop(UP))
    refused(export, f"{UP} is missing")


def last_bytes_gone(raw: RawGguf) -> None:
    name = list(raw.tensors)[-1]
    raw.tensors[name].data = raw.tensors[name].data[:-4]


def test_the_last_tensor_that_ends_early(export: Path) -> None:
    edit_gguf(export, last_bytes_gone)
    refused(export, "ends behind the end of the file")


def data_edit(name: str, start: int, content: bytes) -> Callable[[RawGguf], None]:
    def edit(raw: RawGguf) -> None:
        data = raw.tensors[name].data
        at = start % len(data)
        data[at : at + len(content)] = content

    return edit


@every_format
@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_scales_that_cannot_be(format_name: str, scale: float, exported: MakeExport, tmp_path: Path) -> None:
    export = exported(FORMATS[format_name], format_name).copy(tmp_path / "copy")
    if format_name == "gguf-i2_s":
        edit_gguf(export.folder, data_edit(UP, -32, struct.pack("<f", scale)))
    else:
        size = 66 if format_name == "gguf-tq2_0" else 54
        edit_gguf(export.folder, data_edit(UP, size - 2, struct.pack("<e", scale)))
    refused(export.folder, f"{UP} has a scale that is not positive and finite")


@pytest.mark.parametrize(("format_name", "first_byte"), [("gguf-i2_s", 0b11), ("gguf-tq2_0", 0b1100)])
def test_codes_outside_the_three(format_name: str, first_byte: int, exported: MakeExport, tmp_path: Path) -> None:
    export = exported(FORMATS[format_name], format_name).copy(tmp_path / "copy")
    edit_gguf(export.folder, data_edit(UP, 0, bytes([first_byte])))
    refused(export.folder, rf"{UP}: .*outside \{{-1, 0, 1\}}")


def test_several_scales_in_a_row(exported: MakeExport, tmp_path: Path) -> None:
    export = exported("wide silu", "gguf-tq2_0").copy(tmp_path / "copy")

    def widen(raw: RawGguf) -> None:
        """Two blocks to a row, of which one has another scale."""
        raw.metadata["bitnet.feed_forward_length"] = 512
        for block in range(2):
            down, norm = raw.tensors[f"blk.{block}.ffn_down.weight"], raw.tensors[f"blk.{block}.ffn_sub_norm.weight"]
            rows = np.frombuffer(bytes(down.data), dtype=np.uint8).reshape(256, 66)
            other = rows.copy()
            other[:, 64:] = np.frombuffer(struct.pack("<e", 3.0), dtype=np.uint8)
            both = np.concatenate([rows, other], axis=1)
            raw.tensors[f"blk.{block}.ffn_down.weight"] = RawTensor(35, (256, 512), bytearray(both.tobytes()))
            raw.tensors[f"blk.{block}.ffn_sub_norm.weight"] = RawTensor(0, (512,), norm.data * 2)
            for name in ("ffn_gate", "ffn_up"):
                tensor = raw.tensors[f"blk.{block}.{name}.weight"]
                raw.tensors[f"blk.{block}.{name}.weight"] = RawTensor(35, (512, 256), tensor.data * 2)

    edit_gguf(export.folder, widen)
    refused(export.folder, "blk.0.ffn_down.weight has several scales in a row, which is not read here")


@pytest.mark.parametrize("name", [EMBEDDING, NORM])
def test_tensors_that_are_not_finite(name: str, export: Path) -> None:
    edit_gguf(export, data_edit(name, 0, b"\xff" * 4))
    refused(export, f"{name} holds numbers that are not finite")


def test_rows_that_are_no_whole_blocks(export: Path) -> None:
    overwrite_behind(export, UP, 20, struct.pack("<I", 35))
    refused(export, f"{UP} has rows of 128 weights")


def test_a_norm_of_another_type_is_read(export: Path) -> None:
    values = np.arange(128, dtype=np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
        stored = RawTensor(kind.value, (128,), bytearray(quants.quantize(values, kind).tobytes()))
        stored.data += bytes(-len(stored.data) % 32)
        edit_gguf(export, lambda raw, stored=stored: raw.tensors.update({NORM: stored}))  # type: ignore[misc]
        found = load_gguf(export)[0].norm.weight
        assert torch.allclose(found, torch.from_numpy(values), atol=0.6)


def test_without_gguf_py_the_installation_is_named(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    refused(export, r'pip install "bitnet-train\[export\]"')


def test_numbers_of_every_type_are_read(tmp_path: Path) -> None:
    values = {"B": 200, "b": -3, "H": 60000, "h": -5, "I": 2**32 - 1, "i": -7, "f": 0.5, "?": True, "Q": 2**63, "q": -9}
    kinds = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": FLOAT32, "?": 7, "Q": 10, "q": 11}
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, 2 * len(values) + 1)]
    for letter, value in values.items():
        one = struct.pack(f"<{letter}", value)
        parts += [string(f"one.{letter}"), struct.pack("<I", kinds[letter]), one]
        parts += [string(f"two.{letter}"), struct.pack("<IIQ", 9, kinds[letter], 2), one, one]
    parts += [string("text"), typed("né\n你好")]
    path = tmp_path / "x.gguf"
    path.write_bytes(b"".join(parts))
    found = GgufFile(path).metadata
    assert found.pop("text") == "né\n你好"
    assert found == {f"one.{k}": v for k, v in values.items()} | {f"two.{k}": [v, v] for k, v in values.items()}


def test_a_file_as_large_as_a_disk_is_not_read(export: Path) -> None:
    path = path_of(export)
    os.truncate(path, 1 << 40)  # sparse
    model, _ = load_gguf(export)
    assert model.cfg.layers == 2
