"""The loss of an image classifier: a function of its logits and the right classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_train.training.losses.config import CrossEntropyLoss, Reduction
from bitnet_train.training.losses.parts import LossParts


def class_loss(logits: Tensor, labels: Tensor, cfg: CrossEntropyLoss) -> LossParts:
    """Cross-entropy of logits (batch, classes) with labels (batch,), in float32, and what ``cfg`` adds to it.

    As for the tokens of text: ``z_loss`` times the mean of log(Z)^2 is added, and with ``reduction=sum`` both are sums
    over the images of the pass; the parts are means all the same.
    """
    logits = logits.float()
    nll = F.cross_entropy(logits, labels)
    z = cfg.z_loss * torch.logsumexp(logits, dim=-1).square().mean() if cfg.z_loss else None
    total = nll if z is None else nll + z
    return LossParts(total * len(labels) if cfg.reduction is Reduction.sum else total, nll, z)
