"""Byte layouts of ternary weights, held against gguf-py's and against bytes that microsoft/BitNet wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet_train.export.gguf.blocks import BLOCK, I2_S_BLOCK, I2_S_TAIL, TQ1_0_BYTES, TQ2_0_BYTES
from bitnet_train.export.gguf.layouts import (
    pack_i2_s,
    pack_tq1_0,
    pack_tq2_0,
    unpack_i2_s,
    unpack_tq1_0,
    unpack_tq2_0,
)

Pack = Callable[[Tensor, Tensor], Tensor]
Unpack = Callable[[Tensor, int], tuple[Tensor, Tensor]]
BLOCKWISE: dict[str, tuple[Pack, Unpack, int]] = {
    "TQ1_0": (pack_tq1_0, unpack_tq1_0, TQ1_0_BYTES),
    "TQ2_0": (pack_tq2_0, unpack_tq2_0, TQ2_0_BYTES),
}
GOLDEN = Path(__file__).parent.parent / "data" / "i2_s_golden.json"

both = pytest.mark.parametrize("name", BLOCKWISE)
rows_and_blocks = {"rows": st.integers(0, 9), "blocks": st.integers(1, 4), "seed": st.integers(0, 2**20)}


def random_codes(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) and a positive scale per row."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    return codes, torch.rand(rows, generator=generator) + 0.01


def library(name: str) -> tuple[Any, Any]:
    """gguf-py's module of quantisers and its name for the type."""
    from gguf import GGMLQuantizationType, quants

    return quants, GGMLQuantizationType[name]


@both
@given(**rows_and_blocks)
def test_unpacking_gives_codes_and_scales_back(name: str, rows: int, blocks: int, seed: int) -> None:
    pack, unpack, size = BLOCKWISE[name]
    codes, scale = random_codes(rows, blocks * BLOCK, seed)
    packed = pack(codes, scale)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, blocks * size)
    read, scales = unpack(packed, blocks * BLOCK)
    assert torch.equal(read, codes)
    assert read.dtype is torch.int8
    assert torch.equal(scales, scale.half().float()[:, None].expand(-1, blocks))


@both
@given(**rows_and_blocks)
def test_bytes_are_those_of_gguf_py(name: str, rows: int, blocks: int, seed: int) -> None:
    quants, kind = library(name)
    codes, scale = random_codes(rows + 1, blocks * BLOCK, seed)
    theirs = quants.quantize((codes.float() * scale[:, None]).numpy(), kind)
    ours = BLOCKWISE[name][0](codes, scale).numpy()
    assert np.array_equal(ours, theirs)


@both
@given(**rows_and_blocks)
def test_gguf_py_reads_codes_times_scale(name: str, rows: int, blocks: int, seed: int) -> None:
    quants, kind = library(name)
    codes, scale = random_codes(rows + 1, blocks * BLOCK, seed)
    values = quants.dequantize(BLOCKWISE[name][0](codes, scale).numpy(), kind)
    wanted = codes.float() * scale.half().float()[:, None]
    assert np.array_equal(values, wanted.numpy())


@both
@pytest.mark.parametrize("code", [-1, 0, 1])
def test_blocks_of_one_code(name: str, code: int) -> None:
    pack, unpack, _ = BLOCKWISE[name]
    codes = torch.full((2, BLOCK), code, dtype=torch.int8)
    packed = pack(codes, torch.tensor([0.5, 2.0]))
    read, scales = unpack(packed, BLOCK)
    assert torch.equal(read, codes)
    # A block of zeros keeps the row's scale, which gguf-py would write as 0: both are read.
    assert scales.tolist() == [[0.5], [2.0]]
    quants, kind = library(name)
    assert np.array_equal(quants.dequantize(packed.numpy(), kind), (codes.float() * scales).numpy())


@both
@pytest.mark.parametrize("code", [-128, -2, 2, 3, 127])
def test_other_codes_are_refused(name: str, code: int) -> None:
    codes = torch.zeros((1, BLOCK), dtype=torch.int8)
    codes[0, 100] = code
    with pytest.raises(ValueError, match=r"outside \{-1, 0, 1\}"):
        BLOCKWISE[name][0](codes, torch.ones(1))
    with pytest.raises(ValueError, match=r"outside \{-1, 0, 1\}"):
        pack_i2_s(codes, 1.0)


@pytest.mark.parametrize("position", [0, 31, 63])
@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_the_fourth_code_is_no_code(position: int, shift: int) -> None:
    packed = pack_tq2_0(torch.zeros((1, BLOCK), dtype=torch.int8), torch.ones(1))
    packed[0, position] |= 3 << shift
    with pytest.raises(ValueError, match="damaged"):
        unpack_tq2_0(packed, BLOCK)
    flat = pack_i2_s(torch.zeros((1, BLOCK), dtype=torch.int8), 1.0)
    flat[position] |= 3 << shift
    with pytest.raises(ValueError, match="damaged"):
        unpack_i2_s(flat, 1, BLOCK)


def test_every_byte_of_tq1_0_is_read_as_gguf_py_reads_it() -> None:
    # Five digits fill 243 of 256 values; the others still mean something to a reader.
    quants, kind = library("TQ1_0")
    packed = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, TQ1_0_BYTES).contiguous()
    packed[:, -2:] = torch.tensor([1.0]).half().view(torch.uint8)
    codes, _ = unpack_tq1_0(packed, BLOCK)
    assert np.array_equal(codes.float().numpy(), quants.dequantize(packed.numpy(), kind))


@given(rows=st.integers(0, 9), blocks=st.integers(1, 5), scale=st.floats(2**-16, 1024, width=32), seed=st.integers(0))
def test_i2_s_gives_codes_and_its_scale_back(rows: int, blocks: int, scale: float, seed: int) -> None:
    columns = blocks * I2_S_BLOCK
    codes, _ = random_codes(rows, columns, seed % 2**30)
    packed = pack_i2_s(codes, scale)
    assert packed.shape == (rows * columns // 4 + I2_S_TAIL,)
    read, found = unpack_i2_s(packed, rows, columns)
    assert torch.equal(read, codes)
    assert found == scale


def test_i2_s_bytes_are_those_of_microsofts_quantiser() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert "microsoft/BitNet" in golden["what"]
    signs = {"-": -1, "0": 0, "+": 1}
    codes = torch.tensor([[signs[sign] for sign in row] for row in golden["codes"]], dtype=torch.int8)
    assert codes.shape == (golden["rows"], golden["columns"])
    theirs = bytes.fromhex(golden["bytes_hex"])
    assert pack_i2_s(codes, golden["scale"]).numpy().tobytes() == theirs
    stored = torch.frombuffer(bytearray(theirs), dtype=torch.uint8)
    read, scale = unpack_i2_s(stored, golden["rows"], golden["columns"])
    assert torch.equal(read, codes)
    assert scale == golden["scale"]
