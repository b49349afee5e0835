"""The parts of a training step that Lightning's module and the benchmark's bare loop have in common."""

import torch
from torch import Tensor, nn

from bitnet_train.data.windows import document_numbers, inputs_and_targets
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.clipping.base import ClipResult, ClipRule
from bitnet_train.training.config import RunConfig
from bitnet_train.training.guard.rule import Guard, skip_step
from bitnet_train.training.losses.parts import Loss, LossParts, Taught
from bitnet_train.training.optimizers.build import set_rates
from bitnet_train.training.rates import rates


def next_token_loss(
    decoder: Decoder, loss: Loss, ids: Tensor, bos_id: int | None, taught: Taught | None = None
) -> LossParts:
    """The loss of predicting ``ids[:, 1:]`` from ``ids[:, :-1]``.

    ids (batch, tokens + 1), or (batch, 2, tokens + 1) with targets of -100 in the second row (``data.windows``). With
    ``bos_id``, which begins every document, tokens see their own document only.
    ``taught`` is what the loss's teacher, if it has one, says about the inputs.
    """
    inputs, targets = inputs_and_targets(ids)
    documents = None if bos_id is None else document_numbers(inputs, bos_id)
    collector = loss.collector()
    states = decoder.hidden_states(inputs, documents, collector=collector)
    return loss(states, decoder.head_weight, targets, collector, taught)


def clip_gradients(
    network: nn.Module, rule: ClipRule, guard: Guard | None, optimizer: torch.optim.Optimizer, loss: Tensor, step: int
) -> ClipResult:
    """Clip the gradients before optimizer step ``step`` (from 0) and let the guard judge it by its mean ``loss``.

    A step that the guard skips leaves nothing behind in the memory of the clip rule either.
    """
    if guard is None:
        return rule.clip(network.named_parameters(), step)
    before = [buffer.clone() for buffer in rule.buffers()]
    result = rule.clip(network.named_parameters(), step)
    skip = guard.judge(loss, result.norm, step)
    for buffer, old in zip(rule.buffers(), before, strict=True):
        buffer.copy_(torch.where(skip, old, buffer))
    skip_step(optimizer, skip)
    return result


def set_step_rates(optimizer: torch.optim.Optimizer, cfg: RunConfig, step: int) -> None:
    """Learning rate and weight decay of optimizer step ``step`` (from 0), by the schedules of ``cfg``."""
    at = rates(cfg, step)
    set_rates(optimizer, at.lr, at.weight_decay)
