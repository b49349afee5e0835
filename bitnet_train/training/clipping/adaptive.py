"""Clipping by the ratio of gradient to weight, for every output unit."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from bitnet_train.nn.sharded_codes import whole
from bitnet_train.training.clipping.base import ClipResult, ClipRule
from bitnet_train.training.clipping.config import EMBEDDING_AND_HEAD, AdaptiveClip


class AdaptiveRule(ClipRule):
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, equation 3).

    A row i of a matrix (all but the first dimension of a convolution; a whole vector) whose gradient g_i is longer than
    factor * max(|w_i|, eps) is scaled to that length.

    The reported threshold is the norm that the gradient would have with every clipped unit at its limit and the
    excluded parameters as they are; the norm after clipping is never above it.
    """

    def __init__(self, cfg: AdaptiveClip, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.cfg = cfg
        self._patterns = EMBEDDING_AND_HEAD if cfg.exclude is None else tuple(cfg.exclude)

    def excluded(self, name: str) -> bool:
        """Whether the parameter ``name`` is not clipped."""
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    @torch.no_grad()
    def clip(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> ClipResult:
        norms: list[Tensor] = []  # of each parameter's gradient: before, at its limits, and after
        limits: list[Tensor] = []
        after: list[Tensor] = []
        for name, parameter in parameters:
            if parameter.grad is None:
                continue
            before = unit_norm(parameter.grad)
            limit = clipped = before
            if not self.excluded(name):
                limit = unit_norm(parameter).clamp(min=self.cfg.eps) * self.cfg.factor
                # Where the gradient is zero, 0 / 0 is not needed: the factor there is 1.
                factor = torch.where(before > limit, limit / before, torch.ones_like(before))
                # A gradient that is not a number stays one: a comparison with it is false.
                clipped = before * factor
                parameter.grad.mul_(factor)
            for found, units in ((norms, before), (limits, limit), (after, clipped)):
                found.append(whole(torch.linalg.vector_norm(units)))
        return ClipResult(*(total(parts) for parts in (norms, limits, after)))


def unit_norm(tensor: Tensor) -> Tensor:
    """L2 norm of each unit in float32: (rows, 1, ...) for two and more dimensions, otherwise 0-d."""
    if tensor.dim() < 2:
        return whole(torch.linalg.vector_norm(tensor, dtype=torch.float32))
    dims = tuple(range(1, tensor.dim()))
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=torch.float32)


def total(norms: list[Tensor]) -> Tensor:
    """The norm of a vector of which the parts have these norms; 0 for no parts."""
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
