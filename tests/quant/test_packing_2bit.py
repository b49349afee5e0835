"""2-bit packing against transformers' own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.bitnet import pack_weights, unpack_weights

from bitnet_train.errors import ConfigError
from bitnet_train.quant.packing import pack_2bit, pack_quarters, unpack_2bit, unpack_quarters


def random_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@given(st.integers(1, 9), st.integers(1, 17), st.integers(0, 10**6))
def test_packing_round_trips_and_equals_transformers(quarter: int, columns: int, seed: int) -> None:
    codes = random_codes(4 * quarter, columns, seed)
    before = codes.clone()
    packed = pack_2bit(codes)
    assert torch.equal(codes, before)  # transformers' packer adds 1 to its input
    assert packed.dtype is torch.uint8
    assert packed.shape == (quarter, columns)
    assert torch.equal(packed, pack_weights(codes.clone()))
    unpacked = unpack_2bit(packed)
    assert unpacked.dtype is torch.int8
    assert torch.equal(unpacked, codes)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack_weights(packed, torch.float32), codes.float())


def test_the_layout_is_the_documented_one() -> None:
    codes = torch.tensor([[-1], [0], [1], [1], [-1], [-1], [0], [1]], dtype=torch.int8)
    # rows 0, 2, 4, 6 are 0, 2, 0, 1 in byte 0, and rows 1, 3, 5, 7 are 1, 2, 0, 2 in byte 1
    assert pack_2bit(codes).flatten().tolist() == [0 | 2 << 2 | 0 << 4 | 1 << 6, 1 | 2 << 2 | 0 << 4 | 2 << 6]


def test_strided_codes_pack_alike() -> None:
    codes = random_codes(12, 8)
    assert torch.equal(pack_2bit(codes.t().contiguous().t()), pack_2bit(codes))
    assert torch.equal(pack_2bit(random_codes(24, 8)[::2]), pack_2bit(random_codes(24, 8)[::2].contiguous()))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7])
def test_rows_that_are_no_multiple_of_four_are_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match=f"this layer has {rows}"):
        pack_2bit(random_codes(rows, 3))


@pytest.mark.parametrize("bad", [2, -2, 127, -128])
def test_codes_that_are_not_ternary_are_refused(bad: int) -> None:
    codes = random_codes(8, 3)
    codes[3, 1] = bad
    with pytest.raises(ValueError, match="two bits"):
        pack_2bit(codes)


@pytest.mark.parametrize("bad", [0.5, float("nan")])
def test_values_between_codes_are_refused(bad: float) -> None:
    codes = torch.zeros(4, 2)
    codes[0, 0] = bad
    with pytest.raises(ValueError, match="two bits"):
        pack_2bit(codes)


@pytest.mark.parametrize("slot", range(4))
def test_a_damaged_byte_is_refused(slot: int) -> None:
    packed = pack_2bit(random_codes(8, 3))
    packed[1, 2] |= 3 << (2 * slot)
    with pytest.raises(ValueError, match="damaged"):
        unpack_2bit(packed)


@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_quarters_round_trip(rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, seed)
    before = codes.clone()
    packed = pack_quarters(codes)
    assert torch.equal(codes, before)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, (columns + 3) // 4)
    unpacked = unpack_quarters(packed, columns)
    assert unpacked.dtype is torch.int8
    assert torch.equal(unpacked, codes)
    absent = unpack_quarters(packed, 4 * packed.shape[1])[:, columns:]
    assert torch.equal(absent, torch.zeros_like(absent))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_quarters_are_the_row_layout_turned(rows: int, quarter: int, seed: int) -> None:
    codes = random_codes(rows, 4 * quarter, seed)
    assert torch.equal(pack_quarters(codes), pack_2bit(codes.t()).t())


def test_the_quarters_layout_is_the_documented_one() -> None:
    codes = torch.tensor([[-1, 0, 1, 1, -1, -1]], dtype=torch.int8)
    # Q is 2: columns 0, 2, 4 are 0, 2, 0 in byte 0, and 1, 3, 5 are 1, 2, 0 in byte 1; columns 6 and 7 are absent
    assert pack_quarters(codes).flatten().tolist() == [0 | 2 << 2 | 0 << 4 | 1 << 6, 1 | 2 << 2 | 0 << 4 | 1 << 6]
