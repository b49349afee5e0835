"""The parts of a training step that Lightning's module and the benchmark's bare loop have in common."""

import torch
from torch import Tensor

from bitnet_train.data.windows import document_numbers
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.clipping.base import ClipResult, ClipRule
from bitnet_train.training.config import RunConfig
from bitnet_train.training.guard.rule import Guard, skip_step
from bitnet_train.training.losses.cross_entropy import Loss
from bitnet_train.training.optimizers.build import set_rates
from bitnet_train.training.schedules.factors import learning_rate, weight_decay


def next_token_loss(decoder: Decoder, loss: Loss, ids: Tensor, bos_id: int | None) -> Tensor:
    """The loss of predicting ``ids[:, 1:]`` from ``ids[:, :-1]``.

    ids (batch, tokens + 1). With ``bos_id``, which begins every document, tokens see their own document only.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    documents = None if bos_id is None else document_numbers(inputs, bos_id)
    return loss(decoder.hidden_states(inputs, documents), decoder.head_weight, targets)


def clip_gradients(
    decoder: Decoder, rule: ClipRule, guard: Guard | None, optimizer: torch.optim.Optimizer, loss: Tensor, step: int
) -> ClipResult:
    """Clip the gradients before optimizer step ``step`` (from 0) and let the guard judge it by its mean ``loss``.

    A step that the guard skips leaves nothing behind in the memory of the clip rule either.
    """
    if guard is None:
        return rule.clip(decoder.named_parameters(), step)
    before = [buffer.clone() for buffer in rule.buffers()]
    result = rule.clip(decoder.named_parameters(), step)
    skip = guard.judge(loss, result.norm, step)
    for buffer, old in zip(rule.buffers(), before, strict=True):
        buffer.copy_(torch.where(skip, old, buffer))
    skip_step(optimizer, skip)
    return result


def set_step_rates(optimizer: torch.optim.Optimizer, cfg: RunConfig, step: int) -> None:
    """Learning rate and weight decay of optimizer step ``step`` (from 0), by the schedules of ``cfg``."""
    total = cfg.trainer.max_steps
    lr = learning_rate(cfg.schedule, cfg.optimizer.lr, step, total)
    decay = weight_decay(cfg.schedule, cfg.weight_decay_schedule, cfg.optimizer.weight_decay, step, total)
    set_rates(optimizer, lr, decay)
