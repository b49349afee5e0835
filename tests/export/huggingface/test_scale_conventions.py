"""``weight_scale`` in its two conventions: what is written, and what is read from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.export.config import ExportConfig, ExportDtype, LinearClass
from bitnet_train.export.huggingface.variant import Storage, Variant, choose_variant
from bitnet_train.export.huggingface.writer import direct_scale, effective_scale, stored_scale
from bitnet_train.nn.config import Norms
from bitnet_train.quant.weights import SCALE_FLOOR
from tests.export.conftest import decoder_config

VARIANTS = [Variant(Storage.packed, dtype, c) for dtype in ExportDtype for c in ("autobitlinear", "bitlinear")]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.linear_class} {v.dtype.value}")
# What training can give: at least the floor of mean|W|, at most what no trained weight reaches.
scales = st.floats(float(torch.tensor(SCALE_FLOOR)), 10_000, width=32)


@every_variant
@given(value=scales)
def test_a_scale_that_was_read_is_written_as_the_same_number(variant: Variant, value: float) -> None:
    stored = stored_scale(torch.tensor([value]), variant)
    assert stored.dtype is variant.torch_dtype
    assert torch.equal(stored_scale(direct_scale(stored, variant), variant), stored)


@every_variant
def test_many_random_scales_round_trip(variant: Variant) -> None:
    for exponent in torch.linspace(-16, 13, 3000):
        stored = stored_scale(2 ** exponent.reshape(1), variant)
        assert torch.equal(stored_scale(direct_scale(stored, variant), variant), stored)


@every_variant
@given(value=scales)
def test_what_is_read_is_the_scale_to_the_types_precision(variant: Variant, value: float) -> None:
    scale = torch.tensor([value])
    read = direct_scale(stored_scale(scale, variant), variant)
    assert read.dtype is torch.float32
    assert torch.allclose(read, scale, rtol=torch.finfo(variant.torch_dtype).eps, atol=0)
    # What the consumer multiplies by in effect is the same, up to float32's last digit.
    assert torch.allclose(effective_scale(scale, variant), read, rtol=torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", list(ExportDtype))
@given(value=scales)
def test_a_direct_scale_is_stored_as_it_is(dtype: ExportDtype, value: float) -> None:
    variant, scale = Variant(Storage.packed, dtype, "autobitlinear"), torch.tensor([value])
    assert torch.equal(stored_scale(scale, variant), scale.to(variant.torch_dtype))
    assert torch.equal(direct_scale(stored_scale(scale, variant), variant), scale.to(variant.torch_dtype).float())


def test_the_class_follows_the_norms_unless_it_is_chosen() -> None:
    sub, pre = decoder_config(), decoder_config(norms=Norms.pre)
    auto, forced = ExportConfig(), ExportConfig(linear_class=LinearClass.bitlinear)
    assert choose_variant(Storage.packed, sub, auto).linear_class == "autobitlinear"
    assert choose_variant(Storage.packed, pre, auto).inverse_scales
    assert choose_variant(Storage.packed, sub, forced).inverse_scales
    assert not choose_variant(Storage.master, pre, forced).inverse_scales
    assert choose_variant(Storage.dense, pre, forced).linear_class is None
