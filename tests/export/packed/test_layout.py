"""Codes in bytes: two bits each, or five ternary digits in a byte."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.export.config import Packing
from bitnet_train.export.packed.layout import pack_codes, packed_bytes, unpack_codes

both = pytest.mark.parametrize("packing", list(Packing))
PER_BYTE = {Packing.two_bit: 4, Packing.base3: 5}
IS_WRITTEN: dict[Packing, Callable[[int], bool]] = {
    Packing.two_bit: lambda byte: all((byte >> shift) & 3 < 3 for shift in (0, 2, 4, 6)),
    Packing.base3: lambda byte: byte < 3**5,
}


@both
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 2**20))
def test_unpacking_gives_the_codes_back(packing: Packing, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, tuple(shape), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, packing)
    assert packed.dtype is torch.uint8
    assert packed.shape == (-(-codes.numel() // PER_BYTE[packing]),) == (packed_bytes(codes.numel(), packing),)
    found = unpack_codes(packed, tuple(shape), packing)
    assert torch.equal(found, codes)
    assert found.dtype is torch.int8


@both
def test_a_byte_is_a_number_of_digits_the_first_code_the_lowest(packing: Packing) -> None:
    codes = [-1, 0, 1, 1, 0][: PER_BYTE[packing]]
    radix = 4 if packing is Packing.two_bit else 3
    expected = sum((code + 1) * radix**i for i, code in enumerate(codes))
    assert pack_codes(torch.tensor(codes, dtype=torch.int8), packing).tolist() == [expected]


@both
def test_every_byte_of_a_packer_is_read_and_every_other_refused(packing: Packing) -> None:
    count, accepted = PER_BYTE[packing], 0
    for byte in range(256):
        packed = torch.tensor([byte], dtype=torch.uint8)
        if not IS_WRITTEN[packing](byte):
            with pytest.raises(ValueError, match="damaged"):
                unpack_codes(packed, (count,), packing)
            continue
        accepted += 1
        assert torch.equal(pack_codes(unpack_codes(packed, (count,), packing), packing), packed)
    assert accepted == 3**count


@both
@pytest.mark.parametrize("code", [-128, -2, 2, 127])
def test_other_codes_are_refused(packing: Packing, code: int) -> None:
    codes = torch.zeros(7, dtype=torch.int8)
    codes[4] = code
    with pytest.raises(ValueError, match=r"outside \{-1, 0, 1\}"):
        pack_codes(codes, packing)


@both
def test_the_input_is_left_as_it_is(packing: Packing) -> None:
    codes = torch.tensor([[1, 0, -1], [0, 1, 1]], dtype=torch.int8)
    before = codes.clone()
    pack_codes(codes.t(), packing)
    assert torch.equal(codes, before)
