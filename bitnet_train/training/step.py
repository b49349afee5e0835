"""The parts of a training step that Lightning's module and the benchmark's bare loop have in common."""

import torch
from torch import Tensor

from bitnet_train.data.windows import document_numbers, inputs_and_targets
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses.cross_entropy import Loss
from bitnet_train.training.optimizers.build import set_rates
from bitnet_train.training.schedules.factors import learning_rate, weight_decay


def next_token_loss(decoder: Decoder, loss: Loss, ids: Tensor, bos_id: int | None) -> Tensor:
    """The loss of predicting ``ids[:, 1:]`` from ``ids[:, :-1]``.

    ids (batch, tokens + 1), or (batch, 2, tokens + 1) with targets of -100 in the second row (``data.windows``). With
    ``bos_id``, which begins every document, tokens see their own document only.
    """
    inputs, targets = inputs_and_targets(ids)
    documents = None if bos_id is None else document_numbers(inputs, bos_id)
    return loss(decoder.hidden_states(inputs, documents), decoder.head_weight, targets)


def set_step_rates(optimizer: torch.optim.Optimizer, cfg: RunConfig, step: int) -> None:
    """Learning rate and weight decay of optimizer step ``step`` (from 0), by the schedules of ``cfg``."""
    total = cfg.trainer.max_steps
    lr = learning_rate(cfg.schedule, cfg.optimizer.lr, step, total)
    decay = weight_decay(cfg.schedule, cfg.weight_decay_schedule, cfg.optimizer.weight_decay, step, total)
    set_rates(optimizer, lr, decay)
