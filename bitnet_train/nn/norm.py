"""RMSNorm with float32 arithmetic."""

import torch
from torch import Tensor, nn

from bitnet_train.quant.activations import rms_norm


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32, returned in the type of x.

    In front of quantised layers the module only holds ``weight`` and ``eps``; the op fuses norm and quantiser.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)[0].to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
