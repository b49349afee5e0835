"""The loss of a micro-batch among those of the other processes."""

import torch
from torch import Tensor

from bitnet_train.data.windows import IGNORED, inputs_and_targets
from bitnet_train.training.distributed import group


@torch.no_grad()
def share_of_targets(ids: Tensor) -> Tensor:
    """Predicted tokens of the micro-batch ``ids`` over their mean in the micro-batches of all processes, 0-d float32.

    With it the mean over the processes of their mean losses is the mean over all tokens, as in one process that has
    the whole step in one forward pass. Where no process predicts any it is 0. One number is summed on the device.
    """
    _, targets = inputs_and_targets(ids)
    counted = (targets != IGNORED).sum().float()
    return counted / group.mean(counted).clamp(min=torch.finfo(torch.float32).tiny)
