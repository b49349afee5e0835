"""Master weights made from codes and scales: the quantiser gives exactly these back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.quant.spec import LayerQuant
from bitnet_train.quant.weights import Codes, masters_from_codes, quantise_weight

pytestmark = pytest.mark.usefixtures("one_thread")


@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.3, 0.6, 0.95]),
    exponent=st.floats(-4.9, 4),
    scheme=st.sampled_from(["ternary", "binary"]),
    seed=st.integers(0, 10**6),
)
def test_codes_and_scales_come_back_bit_for_bit(
    groups: int, rows: int, columns: int, zeros: float, exponent: float, scheme: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * rows, columns)
    codes = torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1).to(torch.int8)
    if scheme == "ternary":
        codes[torch.rand(shape, generator=generator) < zeros] = 0
    scale = (10**exponent * (0.5 + torch.rand(groups, generator=generator))).clamp(min=1e-5)
    used = codes.reshape(groups, -1).any(1)
    scale[~used] = 1e-5
    layer = LayerQuant(scheme, groups=groups)
    alike = codes.reshape(groups, -1).float().std(1, unbiased=False) == 0
    if scheme == "binary" and bool(alike.any()):  # no binariser gives a group of one sign
        return
    masters = masters_from_codes(Codes(codes, scale), layer)
    assert masters.dtype is torch.float32
    again = quantise_weight(masters, layer)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale)


@pytest.mark.parametrize("rows", [64, 2560])
def test_large_layers_too(rows: int) -> None:
    weight = torch.randn(rows, 640, generator=torch.Generator().manual_seed(1)) * 0.02
    layer = LayerQuant()
    codes = quantise_weight(weight, layer)
    again = quantise_weight(masters_from_codes(codes, layer), layer)
    assert torch.equal(again.codes, codes.codes)
    assert torch.equal(again.scale, codes.scale)


def test_a_group_without_nonzero_codes_becomes_zero() -> None:
    masters = masters_from_codes(Codes(torch.zeros(2, 8, dtype=torch.int8), torch.tensor([0.3])), LayerQuant())
    assert not masters.any()


@pytest.mark.parametrize(
    ("codes", "layer"),
    [
        (torch.ones(2, 4, dtype=torch.int8) * -1, LayerQuant("binary")),
        (torch.tensor([[1, 0, -1, 1]], dtype=torch.int8), LayerQuant("binary")),
        (torch.ones(2, 4, dtype=torch.int8), LayerQuant(threshold=1.5)),
    ],
)
def test_codes_that_no_weights_give_are_refused(codes: torch.Tensor, layer: LayerQuant) -> None:
    with pytest.raises(ValueError, match="none that the layer's quantiser makes"):
        masters_from_codes(Codes(codes, torch.tensor([0.5])), layer)
