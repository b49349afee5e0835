"""The parts of a training step that Lightning's module and the benchmark's bare loop have in common."""

import torch
from torch import Tensor

from bitnet_train.data.windows import document_numbers
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses.cross_entropy import Loss
from bitnet_train.training.optimizers.build import set_rates
from bitnet_train.training.rates import rates


def next_token_loss(decoder: Decoder, loss: Loss, ids: Tensor, bos_id: int | None) -> Tensor:
    """The loss of predicting ``ids[:, 1:]`` from ``ids[:, :-1]``.

    ids (batch, tokens + 1). With ``bos_id``, which begins every document, tokens see their own document only.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    documents = None if bos_id is None else document_numbers(inputs, bos_id)
    return loss(decoder.hidden_states(inputs, documents), decoder.head_weight, targets)


def set_step_rates(optimizer: torch.optim.Optimizer, cfg: RunConfig, step: int) -> None:
    """Learning rate and weight decay of optimizer step ``step`` (from 0), by the schedules of ``cfg``."""
    at = rates(cfg, step)
    set_rates(optimizer, at.lr, at.weight_decay)
