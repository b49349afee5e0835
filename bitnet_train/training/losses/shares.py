"""What a micro-batch counts for in its step, where not every token is learnt."""

import torch
from torch import Tensor

from bitnet_train.data.windows import IGNORED, inputs_and_targets


@torch.no_grad()
def share_of_targets(ids: Tensor) -> Tensor:
    """The share of the tokens of a micro-batch ``ids`` that are predicted, 0-d float32.

    The mean losses of micro-batches, times their shares and over the mean of these, average to the mean over all tokens
    of the step, however it was cut into micro-batches and processes.
    """
    _, targets = inputs_and_targets(ids)
    return (targets != IGNORED).float().mean()
