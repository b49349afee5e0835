"""Rows of q and k change places for the ``llama`` architecture, which rotates neighbours instead of halves."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.export.gguf.file import GgufFile
from bitnet_train.export.gguf.layouts import unpack_tq2_0
from bitnet_train.export.gguf.reader import gguf_path
from bitnet_train.export.gguf.writer import permuted, unpermuted
from bitnet_train.nn.rotary import negate_first_half, rotary_table, rotate
from tests.export.conftest import MakeExport

shapes = {"heads": st.integers(1, 5), "half": st.integers(1, 6), "columns": st.integers(0, 4)}


@given(**shapes)
def test_back_and_forth_is_the_identity(heads: int, half: int, columns: int) -> None:
    rows = torch.arange(heads * 2 * half * (columns + 1)).reshape(heads * 2 * half, columns + 1)
    assert torch.equal(unpermuted(permuted(rows, heads), heads), rows)
    assert torch.equal(permuted(unpermuted(rows, heads), heads), rows)
    # Scales, one per row, move along.
    assert torch.equal(permuted(rows[:, 0], heads), permuted(rows, heads)[:, 0])


def test_row_j_of_half_h_goes_to_2j_plus_h() -> None:
    rows = torch.arange(12)
    assert permuted(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def rotate_neighbours(x: torch.Tensor, theta: float) -> torch.Tensor:
    """llama.cpp's NORM-type rotation of x (tokens, head_dim): pairs (2 j, 2 j + 1) turn by ``p / theta^(2 j / d)``."""
    tokens, width = x.shape
    angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    even, odd = x[:, ::2], x[:, 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(1)


def test_rotating_neighbours_of_permuted_rows_is_rotating_halves() -> None:
    width, tokens, theta = 16, 9, 1e4
    x = torch.randn(tokens, width)
    cos, sin = rotary_table(width, tokens, theta)
    ours = rotate(x[None, None], cos, negate_first_half(sin))[0, 0]
    theirs = rotate_neighbours(permuted(x.t(), 1).t(), theta)
    assert torch.allclose(permuted(ours.t(), 1).t(), theirs, atol=1e-5)


def test_only_q_and_k_of_llama_files_are_permuted(exported: MakeExport) -> None:
    for kind, moved in (("wide llama", {"q_proj", "k_proj"}), ("wide silu", set())):
        export = exported(kind, "gguf-tq2_0")
        path = gguf_path(export.folder)
        assert path is not None
        file = GgufFile(path)
        found = set()
        for ours, theirs in {
            "q_proj": "attn_q",
            "k_proj": "attn_k",
            "v_proj": "attn_v",
            "o_proj": "attn_output",
        }.items():
            codes = export.run.canonical.codes(f"layers.0.self_attn.{ours}").codes
            data = file.data(f"blk.0.{theirs}.weight", codes.numel() // 256 * 66)
            stored, _ = unpack_tq2_0(torch.from_numpy(data.copy()).reshape(len(codes), -1), 256)
            if not torch.equal(stored, codes):
                found.add(ours)
                assert torch.equal(stored, permuted(codes, 2 if ours == "k_proj" else 4))
        assert found == moved
