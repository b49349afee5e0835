"""Scaled dot-product attention: PyTorch's, and a block form that compiled CPU code runs several times faster."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of one block in the block form: small enough that a block's scores stay in a CPU core's cache.
BLOCK_QUERIES = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """``softmax(q @ k.T / sqrt(head_dim)) @ v``, masked.

    Args:
        q: (batch, heads, queries, head_dim).
        k, v: (batch, kv_heads, keys, head_dim); kv_heads divides heads, each serving as many neighbouring heads.
        mask: True where a query may look, broadcastable to (batch, heads, queries, keys), or None.
        causal: query i sees keys 0 to i only; then queries and keys are the same positions.

    Returns (batch, heads, queries, head_dim) in the type of q.
    """
    grouped = q.shape[1] != k.shape[1]
    # PyTorch 2.13's CPU flash attention runs at a tenth of the machine's bf16 rate. Compiled, the same blocks as plain
    # operations took a third of the time forward and backward; uncompiled their temporaries would cost more than that.
    if torch.compiler.is_compiling() and q.device.type == "cpu" and causal and mask is None and torch.is_grad_enabled():
        return _causal_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _causal_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output: Tensor = _CausalBlocks.apply(q, k, v)
    return output


class _CausalBlocks(torch.autograd.Function):
    """Causal attention block by block of queries, each against the keys it can see.

    Only the probabilities are kept, in the type of v; the scores, which a softmax's own backward would keep in float32,
    are not. The gradients are those of arXiv 2205.14135, appendix B.4: with ``P`` the probabilities, ``O`` the output::

        dV = P.T @ dO     dS = P * (dO @ V.T - rowsum(dO * O)) / sqrt(head_dim)     dQ = dS @ K     dK = dS.T @ Q
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2], device=q.device)
        kept, outputs = [], []
        for rows in _blocks(q.shape[2]):
            seen = slice(0, rows.stop)
            scores = (_by_key_head(q, k, rows) @ k[:, :, seen].mT).float() / math.sqrt(q.shape[-1])
            # A key head's queries are one matrix: (its heads, queries of the block) in one dimension.
            unseen = (positions[None, seen] > positions[rows, None]).repeat(q.shape[1] // k.shape[1], 1)
            kept.append(torch.softmax(scores.masked_fill(unseen, -torch.inf), dim=-1).to(v.dtype))
            outputs.append(_by_head(kept[-1] @ v[:, :, seen], q))
        output = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, output, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, output, *kept = ctx.saved_tensors
        grad = grad.to(v.dtype)
        shared = (grad.float() * output.float()).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
        grads_q, grads_k, grads_v = [], [], []
        for rows, p in zip(_blocks(q.shape[2]), kept, strict=True):
            seen = slice(0, rows.stop)
            grad_rows = _by_key_head(grad, k, rows)
            grad_p = (grad_rows @ v[:, :, seen].mT).float() / math.sqrt(q.shape[-1])
            grad_scores = (p.float() * (grad_p - _by_key_head(shared, k, rows))).to(q.dtype)
            grads_q.append(_by_head(grad_scores @ k[:, :, seen], q))
            grads_k.append(grad_scores.mT @ _by_key_head(q, k, rows))
            grads_v.append(p.mT @ grad_rows)
        return torch.cat(grads_q, dim=2), _sum(grads_k, k), _sum(grads_v, v)


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_QUERIES, tokens)) for start in range(0, tokens, BLOCK_QUERIES)]


def _by_key_head(x: Tensor, k: Tensor, rows: slice) -> Tensor:
    """``rows`` of x (batch, heads, tokens, d) as (batch, kv_heads, heads per kv_head * rows, d)."""
    return x[:, :, rows].unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _by_head(x: Tensor, q: Tensor) -> Tensor:
    """Back to (batch, heads, rows, d)."""
    return x.unflatten(2, (q.shape[1] // x.shape[1], -1)).flatten(1, 2)


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    """The float32 sum of parts (batch, heads, first tokens, d), each over fewer tokens than ``like``, in its type."""
    total = sum(F.pad(part.float(), (0, 0, 0, like.shape[2] - part.shape[2])) for part in parts)
    assert isinstance(total, Tensor)
    return total.to(like.dtype)
