"""What every clip rule is: a module that scales gradients down and says what it did.

Rules are modules, so that what they remember is saved with the checkpoint. Nothing here waits for the device: norms,
thresholds and decisions stay tensors.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet_train.nn.sharded_codes import whole
from bitnet_train.training.clipping.config import ClipConfig


class ClipResult(NamedTuple):
    """L2 norms of the gradient before and after clipping and the threshold it was held to, as 0-d tensors.

    Rules with one threshold for all report that; those with many report the norm of a gradient that is at every limit.
    """

    norm: Tensor
    threshold: Tensor
    clipped: Tensor


class ClipRule(nn.Module):
    """Base: computes the norm of the whole gradient and scales the gradients down to :meth:`threshold`.

    Args:
        cfg: the rule's settings, checked.
        total_steps: optimizer steps of the run, for rules that follow a schedule.
    """

    def __init__(self, cfg: ClipConfig, total_steps: int) -> None:
        super().__init__()

    def threshold(self, norm: Tensor, step: int) -> Tensor:
        """The largest norm allowed in ``step`` (from 0), given the ``norm`` at hand, which it may remember."""
        return torch.full_like(norm, torch.inf)

    @torch.no_grad()
    def clip(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> ClipResult:
        """Clip the gradients of the named ``parameters`` in place, before optimizer step ``step`` (from 0)."""
        grads = gradients(parameters)
        norm = whole(torch.nn.utils.get_total_norm(grads))
        threshold = self.threshold(norm, step)
        return ClipResult(norm, threshold, norm * scale_down(grads, norm, threshold))


def gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
    """The gradients of those ``parameters`` that have one."""
    return [p.grad for _, p in parameters if p.grad is not None]


def scale_down(grads: list[Tensor], norm: Tensor, threshold: Tensor) -> Tensor:
    """Multiply ``grads``, whose norm is ``norm``, in place so that it is at most ``threshold``; the factor.

    The factor is that of ``torch.nn.utils.clip_grads_with_norm_``, bit for bit, which cannot be called: it makes a
    Python number of the threshold and so waits for the device.
    """
    factor = ((norm + 1e-6).reciprocal() * threshold).clamp(max=1.0)
    if grads:
        torch._foreach_mul_(grads, factor)
    return factor
