"""Attention by blocks of queries, which compiled CPU code uses, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from bitnet_train.nn import attention as module
from bitnet_train.nn.attention import BLOCK_QUERIES, _causal_blocks, attention


@pytest.mark.parametrize("tokens", [1, 2, BLOCK_QUERIES - 1, BLOCK_QUERIES, BLOCK_QUERIES + 1, 3 * BLOCK_QUERIES + 5])
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_blocks_equal_pytorchs_attention_and_its_gradients(tokens: int, kv_heads: int) -> None:
    heads = (6, kv_heads, kv_heads)
    leaves = [torch.randn(2, h, tokens, 8, dtype=torch.float64, requires_grad=True) for h in heads]
    grad = torch.randn(2, 6, tokens, 8, dtype=torch.float64)
    got = _causal_blocks(*leaves)
    wanted = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)  # the softmax is in float32
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_heads_compiled_and_not(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    q, k, v = torch.randn(2, 4, 20, 8), torch.randn(2, kv_heads, 20, 8), torch.randn(2, kv_heads, 20, 8)
    wanted = attention(q, k, v, None, True)
    assert torch.allclose(wanted, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    calls = []
    monkeypatch.setattr(module, "_causal_blocks", lambda *args: calls.append(1) or _causal_blocks(*args))
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v, None, True), wanted, rtol=1e-4, atol=1e-5)
    assert calls
    with torch.no_grad():  # keeping scores for a backward pass would cost memory for nothing
        calls.clear()
        assert torch.equal(torch.compile(attention, backend="eager")(q, k, v, None, True), wanted)
        assert not calls


def test_a_mask_goes_to_pytorch() -> None:
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    mask = torch.rand(6, 6) > 0.3
    mask.fill_diagonal_(True)
    got = torch.compile(attention, backend="eager")(q, k, v, mask, False)
    assert torch.allclose(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=1e-4, atol=1e-5)
