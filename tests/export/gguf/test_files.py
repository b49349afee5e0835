"""What lies in a GGUF file, as gguf-py's own reader sees it and as the official I2_S file has it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from bitnet_train.errors import ConfigError
from bitnet_train.export.config import EmbeddingType, ExportConfig, ExportDtype
from bitnet_train.export.gguf.file import GgufFile
from bitnet_train.export.gguf.layouts import unpack_i2_s
from bitnet_train.export.gguf.plan import GgmlType
from bitnet_train.export.gguf.writer import permuted
from bitnet_train.export.writers import FORMATS
from tests.export.conftest import Export, MakeExport, MakeRun, held_by
from tests.export.gguf.raw import RawGguf

MAIN_LINE = ("gguf-tq1_0", "gguf-tq2_0")
GGUF = (*MAIN_LINE, "gguf-i2_s")

BLOCK_TENSORS = {
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
}  # fmt: skip
SUB_NORMS = {"attn_sub_norm", "ffn_sub_norm"}

# The keys of microsoft/BitNet-b1.58-2B-4T-gguf's ggml-model-i2_s.gguf in their order. It has a chat template as well,
# which a base model has not, and lacks tokenizer.ggml.pre.
OFFICIAL_KEYS = """
    general.architecture general.name {arch}.vocab_size {arch}.context_length {arch}.embedding_length
    {arch}.block_count {arch}.feed_forward_length {arch}.rope.dimension_count {arch}.attention.head_count
    {arch}.attention.head_count_kv tokenizer.ggml.add_bos_token {arch}.attention.layer_norm_rms_epsilon
    {arch}.rope.freq_base general.file_type tokenizer.ggml.model tokenizer.ggml.tokens tokenizer.ggml.scores
    tokenizer.ggml.token_type tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id
    tokenizer.ggml.padding_token_id general.quantization_version
"""


def file_of(export: Export) -> Path:
    (path,) = export.folder.glob("*.gguf")
    return path


def as_python(field: Any) -> Any:
    """The value of a field of gguf-py's reader."""
    return field.contents()


@pytest.mark.parametrize("format_name", MAIN_LINE)
@pytest.mark.parametrize("kind", ["wide silu", "wide llama untied", "wide mixed"])
def test_gguf_py_finds_every_tensor_with_type_and_shape(kind: str, format_name: str, exported: MakeExport) -> None:
    export = exported(kind, format_name)
    canonical = export.run.canonical
    found = {t.name: t for t in GGUFReader(file_of(export)).tensors}
    inside = BLOCK_TENSORS | (SUB_NORMS if kind == "wide silu" else set())
    names = {f"blk.{i}.{name}.weight" for i in range(2) for name in inside} | {
        "token_embd.weight",
        "output_norm.weight",
    }
    assert set(found) == names | ({"output.weight"} if kind == "wide llama untied" else set())
    ternary = GGMLQuantizationType[format_name.removeprefix("gguf-").upper()]
    kinds = {name: tensor.tensor_type for name, tensor in found.items()}
    assert kinds["token_embd.weight"] is GGMLQuantizationType.F16
    assert all(kind is GGMLQuantizationType.F32 for name, kind in kinds.items() if "norm" in name)
    assert kinds["blk.0.ffn_down.weight"] is ternary
    assert kinds["blk.1.attn_k.weight"] is (GGMLQuantizationType.F32 if kind == "wide mixed" else ternary)
    # Its shapes begin with the contiguous dimension.
    assert found["token_embd.weight"].shape.tolist() == [256, 416]
    rows = canonical.codes("layers.0.self_attn.v_proj").codes.shape[0]
    assert found["blk.0.attn_v.weight"].shape.tolist() == [256, rows]


@pytest.mark.parametrize("format_name", MAIN_LINE)
@pytest.mark.parametrize("kind", ["wide silu", "wide groups", "wide llama rows", "wide binary"])
def test_gguf_py_reads_codes_times_scales(kind: str, format_name: str, exported: MakeExport) -> None:
    export = exported(kind, format_name)
    found = {t.name: t for t in GGUFReader(file_of(export)).tensors}
    for ours, theirs in {
        "mlp.gate_proj": "ffn_gate",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
    }.items():
        codes = export.run.canonical.codes(f"layers.1.{ours}")
        values = codes.codes.float() * codes.row_scale().half().float()[:, None]
        if export.run.canonical.cfg.norms.value == "pre" and "self_attn" in ours:
            values = permuted(values, 4 if "q_proj" in ours else 2)
        tensor = found[f"blk.1.{theirs}.weight"]
        assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), values.numpy())


@pytest.mark.parametrize("format_name", MAIN_LINE)
@pytest.mark.parametrize(("kind", "arch"), [("wide silu", "bitnet"), ("wide llama", "llama")])
def test_gguf_py_reads_the_metadata(kind: str, arch: str, format_name: str, exported: MakeExport) -> None:
    export = exported(kind, format_name, license="apache-2.0")
    fields = {name: as_python(field) for name, field in GGUFReader(file_of(export)).fields.items()}
    tokenizer = export.run.tokenizer
    assert fields | {
        "general.architecture": arch,
        "general.name": "small",
        "general.license": "apache-2.0",
        "general.file_type": 36 if format_name == "gguf-tq1_0" else 37,
        f"{arch}.vocab_size": 416,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 256,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 256,
        f"{arch}.rope.dimension_count": 64,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": True,
    } == fields  # fmt: skip
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == len(fields["tokenizer.ggml.token_type"]) == 416
    assert tokens[tokenizer.bos_id] == "<|endoftext|>"


@pytest.mark.parametrize("embedding", list(EmbeddingType))
def test_the_embedding_has_the_type_that_was_asked_for(embedding: EmbeddingType, exported: MakeExport) -> None:
    export = exported("wide llama untied", "gguf-tq2_0", embedding=embedding)
    found = {t.name: t for t in GGUFReader(file_of(export)).tensors}
    allowed = {"f32": 0.0, "f16": 5e-4, "q8_0": 0.01, "q6_k": 0.025}[embedding.value]
    for ours, theirs in {"embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}.items():
        tensor, wanted = found[theirs], export.run.canonical.tensor(ours).numpy()
        assert tensor.tensor_type.name.lower() == embedding.value
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.linalg.norm(values - wanted) <= allowed * np.linalg.norm(wanted)


def test_float_layers_follow_the_exports_number_type(exported: MakeExport) -> None:
    for dtype, kind in ((ExportDtype.float32, "F32"), (ExportDtype.bfloat16, "BF16")):
        export = exported("wide mixed", "gguf-tq2_0", dtype=dtype)
        found = {t.name: t for t in GGUFReader(file_of(export)).tensors}
        tensor = found["blk.1.ffn_up.weight"]
        assert tensor.tensor_type.name == kind
        wanted = export.run.canonical.tensor("layers.1.mlp.up_proj.weight").to(getattr(torch, dtype.value)).float()
        assert np.array_equal(quants.dequantize(tensor.data, tensor.tensor_type), wanted.numpy())
        assert found["output_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(
    ("kind", "arch"),
    [("half wide 2b4t", "bitnet-b1.58"), ("half wide silu", "bitnet"), ("half wide llama", "llama")],
)
def test_i2_s_has_the_official_files_keys_and_one_more(kind: str, arch: str, exported: MakeExport) -> None:
    metadata = GgufFile(file_of(exported(kind, "gguf-i2_s"))).metadata
    official = OFFICIAL_KEYS.format(arch=arch).split()
    assert set(metadata) == {*official, "tokenizer.ggml.pre"}
    assert next(iter(metadata)) == "general.architecture"
    assert metadata["general.architecture"] == arch
    assert metadata["general.file_type"] == 40
    assert metadata["general.quantization_version"] == 2


def test_i2_s_tensors_are_codes_and_then_their_scale(exported: MakeExport) -> None:
    export = exported("half wide 2b4t", "gguf-i2_s")
    file, canonical = GgufFile(file_of(export)), export.run.canonical
    assert file.path.name == "ggml-model-i2_s.gguf"
    ours = {"layers.0.self_attn.q_proj": "blk.0.attn_q", "layers.1.mlp.down_proj": "blk.1.ffn_down"}
    for layer, name in ours.items():
        tensor, codes = file.tensors[f"{name}.weight"], canonical.codes(layer)
        assert tensor.type == 36
        size = codes.codes.numel() // 4 + 32
        data = torch.from_numpy(file.data(f"{name}.weight", size).copy())
        found, scale = unpack_i2_s(data, *codes.codes.shape)
        assert torch.equal(found, codes.codes)
        assert scale == float(codes.scale)
        assert not data[-28:].any()


@pytest.mark.parametrize("format_name", GGUF)
def test_tensors_are_aligned_without_gaps_and_sizes_are_those_of_the_plan(
    format_name: str, exported: MakeExport
) -> None:
    for kind in ("wide mixed", "wide silu"):
        export = exported(kind, format_name)
        path, canonical = file_of(export), export.run.canonical
        file = GgufFile(path)
        starts = [tensor.start for tensor in file.tensors.values()]
        assert all(start % 32 == 0 for start in starts)
        raw = RawGguf.read(path)
        stored = {name: len(tensor.data) for name, tensor in raw.tensors.items()}
        size = FORMATS[format_name].size(canonical.cfg, canonical.spec, ExportConfig())
        padding = 31 * len(stored)
        assert size.total_bytes <= sum(stored.values()) <= size.total_bytes + padding
        ternary = {n: stored[n] for n, t in raw.tensors.items() if GgmlType(t.type).name in format_name}
        assert size.code_bytes <= sum(ternary.values()) <= size.code_bytes + padding
        assert size.embedding_bytes == stored["token_embd.weight"] == 416 * 256 * 2
        assert size.code_weights == sum(canonical.codes(layer).codes.numel() for layer in canonical.quantised)
        bits = {"gguf-tq1_0": 1.6875, "gguf-tq2_0": 2.0625, "gguf-i2_s": 2.01}[format_name]
        assert size.bits_per_code == pytest.approx(bits, abs=0.02)


@pytest.mark.parametrize("format_name", GGUF)
@pytest.mark.parametrize("kind", ["wide llama", "wide mixed"])
def test_the_file_is_written_by_the_specification(
    kind: str, format_name: str, exported: MakeExport, tmp_path: Path
) -> None:
    path = file_of(exported(kind, format_name))
    RawGguf.read(path).save(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format_name", GGUF)
def test_the_folder_says_what_it_was_made_from(format_name: str, exported: MakeExport) -> None:
    folder = exported("wide silu", format_name).folder
    assert json.loads((folder / "bitnet_train.json").read_text()) == {"format": format_name, "step": 7}


@pytest.mark.parametrize("format_name", MAIN_LINE)
def test_a_scale_that_float16_cannot_hold_is_refused(format_name: str, small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run("wide silu")
    content = torch.load(run.checkpoint, weights_only=True)
    content["state_dict"]["decoder.layers.0.mlp.up_proj.weight"].mul_(1e7)
    torch.save(content, run.checkpoint)
    with pytest.raises(ConfigError, match=r"blk.0.ffn_up.weight: its scale is too large for tq"):
        run.write(tmp_path / "export", format_name)
    assert not list(tmp_path.iterdir())


def test_every_format_holds_some_kind() -> None:
    assert all(held_by(format_name) for format_name in GGUF)
