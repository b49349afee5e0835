"""Losses: functions of the decoder's final states, its head and the target ids.

The logits of all tokens at once, in float32, are the largest tensors of a small model's training step (2,048 tokens by
8,192 words are 67 MB, three times over). The losses here work on chunks of tokens and compute each chunk's gradients
while its logits are at hand, so that none of it is kept for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.training.chunks import chunk_tokens
from bitnet_train.training.losses.config import CrossEntropyLoss, LossConfig

# (states (batch, tokens, hidden), head weight (vocab, hidden), targets (batch, tokens)) -> scalar mean over all tokens
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood per token in nats of ``softmax(states @ weight.T)``, with a float32 softmax.

    states (batch, tokens, hidden), weight (vocab, hidden), targets (batch, tokens). The products run in the autocast
    type, or that of ``weight``. When gradients are wanted they are computed chunk by chunk in the forward pass
    (the method of Liger Kernel, arXiv 2410.10989, section 3.2, with plain operations); the loss is to be used once.
    """
    dtype = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else None
    dtype = dtype or weight.dtype
    loss: Tensor = _LinearCrossEntropy.apply(states.flatten(0, -2), weight, targets.flatten(), dtype)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            tokens, size = states.shape[0], chunk_tokens(weight.shape[0], states.device.type)
            head, total = weight.to(dtype), states.new_zeros((), dtype=torch.float32)
            grad_states: list[Tensor] = []
            grad_weight: Tensor | None = None
            for start in range(0, tokens, size):
                x, wanted = states[start : start + size].to(dtype), targets[start : start + size]
                logits = x @ head.t()
                log_sum = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
                total = total + (log_sum - logits.gather(1, wanted[:, None]).float()).sum()
                if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
                    continue
                # d loss / d logits = (softmax - one-hot) / tokens
                words = torch.arange(weight.shape[0], device=logits.device)
                grad = torch.exp(logits.float() - log_sum) - (words == wanted[:, None]).float()
                grad = (grad / tokens).to(dtype)
                grad_states.append(grad @ head)
                part = (grad.t() @ x).float()
                grad_weight = part if grad_weight is None else grad_weight + part
        if grad_weight is not None:
            ctx.save_for_backward(torch.cat(grad_states), grad_weight)
            ctx.types = states.dtype, weight.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_states, grad_weight = ctx.saved_tensors
        states_dtype, weight_dtype = ctx.types
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        return (
            (grad_states * grad).to(states_dtype) if wants_states else None,
            (grad_weight * grad).to(weight_dtype) if wants_weight else None,
            None,
            None,
        )


# Add a loss: a dataclass in training.config.LOSS_CONFIGS, and a builder (config -> Loss) here.
LOSSES: dict[type[LossConfig], Callable[..., Loss]] = {CrossEntropyLoss: lambda cfg: linear_cross_entropy}


def build_loss(cfg: LossConfig) -> Loss:
    """The loss of a configuration."""
    if type(cfg) not in LOSSES:
        raise ConfigError(f"loss={cfg.name} has no entry in bitnet_train.training.losses.cross_entropy.LOSSES")
    return LOSSES[type(cfg)](cfg)
