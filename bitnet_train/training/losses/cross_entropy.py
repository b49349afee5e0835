"""Losses of the next token's distribution: functions of the decoder's final states, its head and the target ids.

The logits of all tokens at once, in float32, are the largest tensors of a small model's training step (2,048 tokens by
8,192 words are 67 MB, three times over). The losses here work on chunks of tokens and compute each chunk's gradients
while its logits are at hand, so that none of it is kept for the backward pass. A teacher's logits exist by the same
chunks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet_train.nn.collector import Collector
from bitnet_train.training.chunks import chunk_tokens
from bitnet_train.training.losses.config import CrossEntropyLoss, Reduction
from bitnet_train.training.losses.parts import LossParts, Taught

# A target that is not predicted, as in torch.nn.functional.cross_entropy.
IGNORED = -100


class LinearLossOptions(NamedTuple):
    """Weights of what is added to the cross-entropy, and whether tokens are summed instead of averaged."""

    z_loss: float = 0.0
    summed: bool = False
    # Of temperature^2 * KL(teacher || student) at ``temperature``; without a teacher it has no effect.
    kl: float = 0.0
    temperature: float = 1.0


class LinearLoss(NamedTuple):
    """Scalars: what is minimised, and the means per counted token of nll, log(Z)^2 and temperature^2 * KL, unweighted
    and without history."""

    total: Tensor
    nll: Tensor
    z: Tensor
    kl: Tensor


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood per token in nats of ``softmax(states @ weight.T)``, with a float32 softmax.

    states (batch, tokens, hidden), weight (vocab, hidden), targets (batch, tokens); targets of -100 are left out, and
    without any other the loss is 0. The products run in the autocast type, or that of ``weight``. When gradients are
    wanted they are computed chunk by chunk in the forward pass (the method of Liger Kernel, arXiv 2410.10989, section
    3.2, with plain operations); the loss is to be used once.
    """
    return linear_loss(states, weight, targets).total


def linear_loss(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LinearLossOptions = LinearLossOptions(),  # noqa: B008  (immutable)
    taught: tuple[Tensor, Tensor] | None = None,
) -> LinearLoss:
    """:func:`linear_cross_entropy` and what ``options`` adds to it, in the same pass over chunks of tokens.

    With z the logits of a token, y its target and a teacher's logits t::

        nll = logsumexp(z) - z[y]              + z_loss * logsumexp(z)^2           (PaLM, arXiv 2204.02311, section 5)
        + kl * T^2 * sum softmax(t/T) * (log_softmax(t/T) - log_softmax(z/T))      (arXiv 1503.02531, section 2)

    and ``total`` is their mean or sum over the tokens that are counted. ``taught`` are the teacher's final states
    (batch, tokens, its hidden) and head (vocab, its hidden), which get no gradients. float64 stays float64.
    """
    dtype = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else None
    dtype = dtype or weight.dtype
    teacher = (None, None) if taught is None else (taught[0].detach().flatten(0, -2), taught[1].detach())
    total, means = _LinearLoss.apply(states.flatten(0, -2), weight, targets.flatten(), dtype, options, *teacher)
    return LinearLoss(total, *means.detach().unbind())


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        options: LinearLossOptions,
        teacher_states: Tensor | None,
        teacher_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        with torch.autocast(states.device.type, enabled=False):
            tokens, size = states.shape[0], chunk_tokens(weight.shape[0], states.device.type)
            head = weight.to(dtype)
            teacher_head = None if teacher_weight is None else teacher_weight.to(dtype)
            nll, z, kl = (states.new_zeros((), dtype=wide) for _ in range(3))
            counted = targets != IGNORED
            count = counted.sum().clamp(min=1).to(wide)
            # What a token's gradient is divided by: one that is not counted has none.
            divisor = torch.where(counted, torch.ones_like(count) if options.summed else count, torch.inf)
            grad_states: list[Tensor] = []
            grad_weight: Tensor | None = None
            for start in range(0, tokens, size):
                rows = slice(start, start + size)
                x, wanted, counts = states[rows].to(dtype), targets[rows], counted[rows]
                logits = x @ head.t()
                log_sum = torch.logsumexp(logits.to(wide), dim=-1, keepdim=True)
                picked = logits.gather(1, wanted.clamp(min=0)[:, None]).to(wide)
                nll = nll + _sum(log_sum - picked, counts)
                if options.z_loss:
                    z = z + _sum(log_sum.square(), counts)
                soft: Tensor | None = None  # the difference of the softened distributions
                if teacher_states is not None and teacher_head is not None:
                    taught = teacher_states[rows].to(dtype) @ teacher_head.t()
                    log_p = torch.log_softmax(taught.to(wide) / options.temperature, dim=-1)
                    log_q = torch.log_softmax(logits.to(wide) / options.temperature, dim=-1)
                    p = log_p.exp()
                    kl = kl + _sum((p * (log_p - log_q)).sum(-1, keepdim=True), counts)
                    soft = log_q.exp() - p
                if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
                    continue
                # d nll / d logits = softmax - one-hot
                words = torch.arange(weight.shape[0], device=logits.device)
                grad = torch.exp(logits.to(wide) - log_sum)
                pull = grad * (2 * options.z_loss * log_sum) if options.z_loss else None
                grad = grad - (words == wanted[:, None]).to(wide)
                if pull is not None:
                    grad = grad + pull
                if soft is not None:
                    grad = grad + (options.kl * options.temperature) * soft
                grad = (grad / divisor[rows, None]).to(dtype)
                grad_states.append(grad @ head)
                part = (grad.t() @ x).to(wide)
                grad_weight = part if grad_weight is None else grad_weight + part
            means = torch.stack([nll / count, z / count, kl / count * options.temperature**2])
            parts = [nll, *([options.z_loss * z] if options.z_loss else [])]
            if teacher_states is not None:
                parts.append(options.kl * options.temperature**2 * kl)
            total = torch.stack(parts).sum() if len(parts) > 1 else nll
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grad_states), grad_weight)
            ctx.types = states.dtype, weight.dtype
        return total if options.summed else total / count, means

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        states_dtype, weight_dtype = ctx.types
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        return (
            (grad_states * grad).to(states_dtype) if wants_states else None,
            (grad_weight * grad).to(weight_dtype) if wants_weight else None,
            *([None] * 5),
        )


def _sum(values: Tensor, counted: Tensor) -> Tensor:
    """The sum of values (tokens, 1) of the tokens that are counted."""
    return torch.where(counted[:, None], values, 0.0).sum()


class CrossEntropy:
    """``loss=cross_entropy``, a :class:`Loss`."""

    def __init__(self, cfg: CrossEntropyLoss) -> None:
        self.options = LinearLossOptions(cfg.z_loss, cfg.reduction is Reduction.sum)

    def collector(self) -> Collector | None:
        return None

    def __call__(
        self,
        states: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        collector: Collector | None = None,
        taught: Taught | None = None,
    ) -> LossParts:
        found = linear_loss(states, head_weight, targets, self.options)
        z = self.options.z_loss * found.z if self.options.z_loss else None
        return LossParts(found.total, found.nll, z)
