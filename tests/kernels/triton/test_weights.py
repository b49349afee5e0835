"""Triton's weight quantisers, transposition and packing against the oracle, bit for bit."""

import pytest
import torch
from torch import Tensor

from bitnet_train.kernels.triton.weights import (
    SUM_CHUNK,
    absmean_scale,
    binarise_into,
    mean_kernel,
    pack_into,
    ternarise_into,
)
from bitnet_train.quant import weights as oracle
from bitnet_train.quant.packing import pack_quarters

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FP8 = torch.float8_e4m3fn
# rows, columns, groups; the last is more than one chunk of the sum to a group
SHAPES = [(1, 1, 1), (3, 1, 3), (1, 7, 1), (6, 5, 3), (12, 5, 12), (129, 67, 1), (130, 131, 13), (300, 257, 2)]


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_are_the_oracles(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = (torch.randn(*shape[:2]) * 0.02).to(dtype)
    scale = absmean_scale(weight.to(device), shape[2])
    assert scale.dtype is torch.float32
    assert torch.equal(scale.cpu(), oracle.absmean_scale(weight, shape[2]))
    wide = torch.zeros(shape[0], 2 * shape[1], dtype=dtype)
    wide[:, ::2] = weight
    assert torch.equal(absmean_scale(wide.to(device)[:, ::2], shape[2]), scale)


def test_the_sum_is_in_float64(device: torch.device) -> None:
    # In float32 the ones would vanish beside 2^25.
    weight = torch.ones(1, SUM_CHUNK + 1000)
    weight[0, 0] = 2.0**25
    expected = (2.0**25 + weight.numel() - 1) / weight.numel()
    assert absmean_scale(weight.to(device), 1).item() == torch.tensor(expected, dtype=torch.float64).float().item()


def test_scales_of_zero_and_bad_groups(device: torch.device) -> None:
    weight = torch.randn(8, 5)
    weight[0:2], weight[2, 1], weight[4, 2] = 0.0, float("nan"), float("-inf")
    scale = absmean_scale(weight.to(device), 4).cpu()
    assert torch.equal(scale[[0, 2, 3]], oracle.absmean_scale(weight, 4)[[0, 2, 3]])
    assert scale[0].item() == pytest.approx(1e-5)
    assert bool(scale[1].isnan())


def test_many_chunks_are_added_up(device: torch.device) -> None:
    partial, means = torch.rand(3, 2500, dtype=torch.float64), torch.full((3,), 77.0, device=device)
    mean_kernel[(3,)](partial.to(device), means, 4096, 2500, True, 1024, num_warps=4, enable_fp_fusion=False)
    assert torch.equal(means.cpu(), (partial.sum(1) / 4096).float())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_ternary_codes_and_their_transposition(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    rows, columns, groups = shape
    weight = (torch.randn(rows, columns) * 0.02).to(dtype)
    expected = oracle.ternarise(weight, threshold, groups)
    for transposed in (None, torch.int8, FP8):
        # Parts of stacks, whose other elements must stay.
        stack = torch.full((rows + 3, columns + 1), 77, dtype=torch.int8, device=device)
        stack_t = torch.full((columns, rows + 5), 72.0, device=device).to(transposed or torch.int8)
        codes, codes_t = stack[2:-1, :columns], stack_t[:, 3:-2]
        ternarise_into(
            weight.to(device), expected.scale.to(device), threshold, codes, None if transposed is None else codes_t
        )
        assert torch.equal(codes.cpu(), expected.codes)
        assert int((stack == 77).sum()) == stack.numel() - codes.numel()
        if transposed is not None:
            assert torch.equal(codes_t.cpu().float(), expected.codes.t().float())
        assert int((stack_t.float() == 72).sum()) == stack_t.numel() - (0 if transposed is None else codes_t.numel())


def test_codes_at_the_threshold_and_of_bad_weights(device: torch.device) -> None:
    weight = torch.tensor([[0.5, -0.5, 0.50000006, -0.50000006, 1.5, 2.5, 0.0, -0.0],
                           [float("nan"), float("inf"), -float("inf"), 1.0, 1e-30, -1e38, 0.25, 0.75]])  # fmt: skip
    for scale in (torch.tensor([1.0, 0.5]), torch.tensor([float("nan"), float("inf")]), torch.tensor([1e-5, 3.0])):
        ratio = weight / scale[:, None]
        codes = torch.empty(2, 8, dtype=torch.int8, device=device)
        ternarise_into(weight.to(device), scale.to(device), 0.5, codes)
        assert torch.equal(codes.cpu(), (ratio > 0.5).to(torch.int8) - (ratio < -0.5).to(torch.int8))


def test_the_division_is_exact(device: torch.device) -> None:
    # Weights within a rounding of the threshold, which an approximate division would move across it.
    scale = torch.rand(512) + 0.5
    weight = torch.nextafter((scale / 2)[:, None], torch.tensor([0.0, 10.0]))
    weight = torch.cat([weight, (scale / 2)[:, None], (scale * 0.7)[:, None]], dim=1)
    for threshold in (0.5, 0.7):
        ratio = weight / scale[:, None]
        codes = torch.empty(512, 4, dtype=torch.int8, device=device)
        ternarise_into(weight.to(device), scale.to(device), threshold, codes)
        assert torch.equal(codes.cpu(), (ratio > threshold).to(torch.int8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_binary_codes(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, groups = shape
    weight = (torch.randn(rows, columns) * 0.02 + 0.01).to(dtype)
    expected = oracle.binarise(weight, groups)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
    for transposed in (None, torch.int8, FP8):
        codes_t = None if transposed is None else torch.empty(columns, rows, dtype=transposed, device=device)
        scale = binarise_into(weight.to(device), groups, codes.fill_(77), codes_t)
        assert torch.equal(codes.cpu(), expected.codes)
        assert torch.equal(scale.cpu(), expected.scale)
        if codes_t is not None:
            assert torch.equal(codes_t.cpu().float(), expected.codes.t().float())


def test_strided_masters_and_targets(device: torch.device) -> None:
    weight, scale = torch.randn(10, 14, device=device), torch.tensor([0.5], device=device)
    codes = torch.empty(5, 7, dtype=torch.int8, device=device)
    for master in (weight[::2, :7], weight[:5, ::2], weight[:7, :5].t(), weight[0, :7].expand(5, 7)):
        ternarise_into(master, scale, 0.5, codes)
        assert torch.equal(
            codes.cpu(), ((master / 0.5) > 0.5).to(torch.int8).cpu() - (master / 0.5 < -0.5).char().cpu()
        )
    with pytest.raises(ValueError, match="contiguous"):
        ternarise_into(weight[:7, :5], scale, 0.5, codes.t())
    with pytest.raises(ValueError, match="contiguous"):
        ternarise_into(weight[:5, :7], scale, 0.5, codes, codes.t())
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        ternarise_into(weight[:4, :7], scale, 0.5, codes)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (5, 64), (3, 4099), (2, 8192)])
def test_packing_is_the_oracles(device: torch.device, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    quarter = (shape[1] + 3) // 4
    stack = torch.full((shape[0] + 2, quarter + 1), 0xFF, dtype=torch.uint8, device=device)
    pack_into(codes.to(device), stack[1:-1, :quarter])
    assert torch.equal(stack[1:-1, :quarter].cpu(), pack_quarters(codes))
    assert int((stack == 0xFF).sum()) == stack.numel() - shape[0] * quarter
    transposed = codes.to(device).t().contiguous().t()
    pack_into(transposed, stack[1:-1, :quarter])
    assert torch.equal(stack[1:-1, :quarter].cpu(), pack_quarters(codes))


def test_packing_into_another_shape_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        pack_into(random_codes(3, 8).to(device), torch.empty(3, 8, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="contiguous"):
        pack_into(random_codes(3, 8).to(device), torch.empty(2, 3, dtype=torch.uint8, device=device).t())
