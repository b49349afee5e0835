"""A GGUF file read into our own decoder computes what was trained."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet_train.export.config import EmbeddingType, ExportDtype
from bitnet_train.export.gguf.blocks import as_float32
from bitnet_train.export.gguf.reader import GgufModel, gguf_path, load_gguf, read_gguf
from bitnet_train.nn.layout import quantised_layers
from tests.export.conftest import Export, MakeExport, held_by
from tests.export.gguf.raw import edit_gguf

GGUF = ("gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s")
CASES = [(name, kind) for name in GGUF for kind in held_by(name)]


def as_stored(scale: Tensor) -> Tensor:
    """A scale as the blocks of llama.cpp hold it."""
    return scale.half().float()


def read(export: Export) -> GgufModel:
    path = gguf_path(export.folder)
    assert path is not None
    return read_gguf(path)


@pytest.mark.parametrize(("format_name", "kind"), CASES)
def test_codes_and_scales_are_the_runs(format_name: str, kind: str, exported: MakeExport) -> None:
    export = exported(kind, format_name)
    found, canonical = read(export), export.run.canonical
    assert set(found.codes) == set(canonical.quantised)
    for layer, codes in found.codes.items():
        wanted = canonical.codes(layer)
        assert torch.equal(codes.codes, wanted.codes)
        exact = wanted.row_scale() if format_name == "gguf-i2_s" else as_stored(wanted.row_scale())
        assert torch.equal(codes.row_scale(), exact)


@pytest.mark.parametrize(("format_name", "kind"), CASES)
def test_the_shape_is_the_runs(format_name: str, kind: str, exported: MakeExport) -> None:
    export = exported(kind, format_name)
    found, canonical = read(export), export.run.canonical
    assert found.cfg == canonical.cfg
    assert set(quantised_layers(found.cfg, found.spec)) == set(canonical.quantised)


@pytest.mark.parametrize(("format_name", "kind"), CASES)
def test_logits_are_the_runs_bit_for_bit_where_nothing_is_rounded(
    format_name: str, kind: str, exported: MakeExport
) -> None:
    export = exported(kind, format_name, embedding=EmbeddingType.f32)
    scale_of = None if format_name == "gguf-i2_s" else as_stored
    expected = export.run.logits(export.run.canonical.decoder(scale_of=scale_of))
    assert torch.equal(export.run.logits(load_gguf(export.folder)[0]), expected)


@pytest.mark.parametrize(("embedding", "allowed"), [("f32", 0.0), ("f16", 5e-4), ("q8_0", 0.01), ("q6_k", 0.025)])
@pytest.mark.parametrize("kind", ["wide silu", "wide llama untied"])
def test_the_embedding_is_rounded_to_its_type_and_no_further(
    kind: str, embedding: str, allowed: float, exported: MakeExport
) -> None:
    export = exported(kind, "gguf-i2_s", embedding=EmbeddingType(embedding))
    found = read(export).tensors
    for name in ("embed_tokens.weight", *(["lm_head.weight"] if "untied" in kind else [])):
        wanted = export.run.canonical.tensor(name)
        assert float((found[name] - wanted).norm() / wanted.norm()) <= allowed
    assert torch.equal(found["norm.weight"], export.run.canonical.tensor("norm.weight"))


def test_layers_in_bfloat16_are_read_as_they_are_stored(exported: MakeExport) -> None:
    export = exported("wide mixed", "gguf-tq2_0", dtype=ExportDtype.bfloat16)
    for name, found in read(export).tensors.items():
        wanted = export.run.canonical.tensor(name)
        if "proj" in name:
            assert torch.equal(found, wanted.bfloat16().float())
        elif "norm" in name:
            assert torch.equal(found, wanted)


@given(st.floats(1e-12, 1e8, width=64))
def test_a_number_comes_back_as_it_was_typed(value: float) -> None:
    stored = struct.unpack("<f", struct.pack("<f", value))[0]
    assert np.float32(as_float32(stored)) == np.float32(value)
    typed = float(f"{value:.6g}")
    assert as_float32(struct.unpack("<f", struct.pack("<f", typed))[0]) == typed
    assert as_float32(as_float32(stored)) == as_float32(stored)


@pytest.mark.parametrize("value", [0.0, -1e-5, 1e-45, 3.4028234663852886e38, -3.4028234663852886e38])
def test_the_smallest_and_largest_numbers_come_back(value: float) -> None:
    assert np.float32(as_float32(value)) == np.float32(value)


@pytest.mark.parametrize("rows", [1, 256])
def test_rows_of_zeros_may_have_the_scale_that_gguf_py_gives_them(
    rows: int, exported: MakeExport, tmp_path: Path
) -> None:
    export = exported("wide silu", "gguf-tq2_0").copy(tmp_path / "copy")
    zeros = quants.quantize(np.zeros((rows, 256), dtype=np.float32), GGMLQuantizationType.TQ2_0).tobytes()
    name = "blk.1.ffn_up.weight"
    edit_gguf(export.folder, lambda raw: raw.tensors[name].data.__setitem__(slice(0, len(zeros)), zeros))
    found, wanted = read(export).codes["layers.1.mlp.up_proj"], export.run.canonical.codes("layers.1.mlp.up_proj")
    assert not found.codes[:rows].any()
    assert torch.equal(found.codes[rows:], wanted.codes[rows:])
    assert torch.equal(found.row_scale()[rows:], as_stored(wanted.row_scale())[rows:])
    assert bool((found.scale > 0).all())


def test_a_folder_without_a_file(exported: MakeExport) -> None:
    assert gguf_path(exported("2b4t").folder) is None
