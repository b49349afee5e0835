"""The chunked cross-entropy against PyTorch's on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.training.chunks import chunk_tokens
from bitnet_train.training.losses import cross_entropy as losses
from bitnet_train.training.losses.cross_entropy import linear_cross_entropy


def inputs(dtype: torch.dtype = torch.float32, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    states = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 16, dtype=dtype, requires_grad=True)
    return states, weight, torch.randint(0, vocab, (3, 7))


def plain(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight).flatten(0, 1).float(), targets.flatten())


@pytest.mark.parametrize("chunk", [1, 4, 21, 64])
@pytest.mark.parametrize("learning", ["sw", "s", "w", ""])
def test_loss_and_gradients_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int, learning: str) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: chunk)
    states, weight, targets = inputs()
    states.requires_grad_("s" in learning)
    weight.requires_grad_("w" in learning)
    got, wanted = linear_cross_entropy(states, weight, targets), plain(states, weight, targets)
    assert got.dtype is torch.float32
    assert torch.allclose(got, wanted, rtol=1e-6)
    leaves = [t for t in (states, weight) if t.requires_grad]
    if leaves:
        pairs = zip(torch.autograd.grad(got * 3, leaves), torch.autograd.grad(wanted * 3, leaves), strict=True)
        for ours, theirs in pairs:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    else:
        assert not got.requires_grad


def test_under_autocast_products_are_bf16_and_the_softmax_float32() -> None:
    states, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(states, weight, targets)
        wanted = plain(states, weight, targets)
    assert torch.allclose(got, wanted, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got, (states, weight)), torch.autograd.grad(wanted, (states, weight)), strict=True
    ):
        assert ours.dtype is torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_bf16_model_gets_bf16_gradients() -> None:
    states, weight, targets = inputs(torch.bfloat16)
    grads = torch.autograd.grad(linear_cross_entropy(states, weight, targets), (states, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2


def test_no_tensor_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab, device: 4)
    states, weight, targets = inputs(vocab=1000)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(states, weight, targets)
    assert max(t.numel() for t in kept) == weight.numel()  # the gradient of the head; the logits would be 21,000
    assert weight.numel() < 21 * 1000


def test_extreme_logits_stay_finite_and_nan_shows() -> None:
    states, weight, targets = inputs()
    assert bool(torch.isfinite(linear_cross_entropy(states * 1e4, weight, targets)))
    bad = states.detach().clone()
    bad[0, 0, 0] = float("nan")
    assert bool(linear_cross_entropy(bad, weight, targets).isnan())


def test_chunks_are_powers_of_two_and_bounded() -> None:
    assert chunk_tokens(8192, "cpu") == 512
    assert chunk_tokens(128_256, "cuda") == 512
    assert chunk_tokens(10**9, "cpu") == 64
    assert chunk_tokens(1, "mps") == 2**26
