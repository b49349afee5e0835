"""Relations between tokens: how the queries, keys or values of one block see each other, a teacher's and a student's.

MiniLMv2 (arXiv 2012.15828, section 3.1): the vectors A of all heads are put side by side and cut into ``heads``
relation heads of width d, and ``R = softmax(A @ A.T / sqrt(d))``. The loss is KL(R of the teacher || R of the student),
a mean over tokens and relation heads. BitDistill (arXiv 2510.13998) has the same in equations 11 and 12, and in its
Algorithm 1 vectors of length 1 and no ``sqrt(d)``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.training.chunks import chunk_elements
from bitnet_train.training.losses.config import RelationForm, RelationMask


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    heads: int,
    form: RelationForm,
    mask: RelationMask,
    learnt: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of the relations between tokens, a float32 scalar (float64 for float64 inputs).

    student (batch, tokens, width) and teacher (batch, tokens, its width), both widths multiples of ``heads``. A mean
    over the relations of all tokens, or of those where ``learnt`` (batch, tokens) is true; 0 where none is. Relations
    are computed in float32 whatever the autocast type, for a few sequences at a time, and with them the gradient.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = _relation_heads(student, heads), _relation_heads(teacher.detach(), heads)
        if form is RelationForm.cosine:
            ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
            scales = 1.0, 1.0
        else:
            scales = 1 / math.sqrt(ours.shape[-1]), 1 / math.sqrt(theirs.shape[-1])
        loss: Tensor = _RelationKl.apply(ours, theirs, *scales, mask is RelationMask.causal, learnt)
    return loss


def _relation_heads(x: Tensor, heads: int) -> Tensor:
    """x (batch, tokens, width) as (batch, heads, tokens, width / heads), in float32 or float64."""
    wide = x if x.dtype is torch.float64 else x.float()
    return wide.unflatten(-1, (heads, -1)).transpose(1, 2)


class _RelationKl(torch.autograd.Function):
    """With S = scale * A @ A.T and P, Q the softmax of the teacher's and the student's rows of it::

    dKL/dS = (Q - P) / rows          dKL/dA = scale * (dS + dS.T) @ A

    Rows of tokens that are not learnt are zero in dS and not counted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ours: Tensor,
        theirs: Tensor,
        scale: float,
        their_scale: float,
        causal: bool,
        learnt: Tensor | None,
    ) -> Tensor:
        batch, heads, tokens, _ = ours.shape
        rows = batch * heads * tokens if learnt is None else heads * learnt.sum().clamp(min=1).to(ours.dtype)
        left_out = None if learnt is None else ~learnt[:, None, :, None]
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=ours.device).triu(1) if causal else None
        together = max(1, chunk_elements(ours.device.type) // (heads * tokens * tokens))
        total, grads = ours.new_zeros(()), []
        for start in range(0, batch, together):
            a = ours[start : start + together]
            log_q = _log_relations(a, scale, unseen)
            log_p = _log_relations(theirs[start : start + together], their_scale, unseen)
            p = log_p.exp()
            terms = p * (log_p - log_q)
            terms = terms if unseen is None else terms.masked_fill(unseen, 0.0)  # 0 * inf
            without = None if left_out is None else left_out[start : start + together]
            total = total + (terms if without is None else terms.masked_fill(without, 0.0)).sum()
            if ctx.needs_input_grad[0]:
                grad = (log_q.exp() - p) * (scale / rows)
                grad = grad if without is None else grad.masked_fill(without, 0.0)
                grads.append((grad + grad.mT) @ a)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return total / rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad_ours,) = ctx.saved_tensors
        return grad_ours * grad, None, None, None, None, None


def _log_relations(a: Tensor, scale: float, unseen: Tensor | None) -> Tensor:
    scores = (a @ a.mT) * scale
    return torch.log_softmax(scores if unseen is None else scores.masked_fill(unseen, -torch.inf), dim=-1)
