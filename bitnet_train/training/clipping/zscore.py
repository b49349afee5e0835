"""Clipping of norms that are outliers among those before."""

import torch
from torch import Tensor

from bitnet_train.training.clipping.base import ClipRule
from bitnet_train.training.clipping.config import ZScoreClip, ZScoreTarget

# Added to the standard deviation, as the paper's code does: the first norms may all be equal.
EPS = 1e-6


class ZScoreRule(ClipRule):
    """ZClip (Kumar et al. 2025, arXiv 2504.02507, section 3).

    With the moving mean and deviation of the norms before, z = (norm - mean) / (deviation + EPS). A norm with z above
    the threshold is clipped to mean + z* deviation; z* = z_threshold^2 / z (reciprocal), z_threshold, or 0. The clipped
    norm then enters the moving mean, m = alpha m + (1 - alpha) norm, and the variance,
    v = alpha v + (1 - alpha) (norm - m)^2. The first ``warmup`` norms make the first mean and variance.

    Norms that are not finite are clipped to whatever is allowed and not remembered.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, cfg: ZScoreClip, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.cfg = cfg
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def threshold(self, norm: Tensor, step: int) -> Tensor:
        cfg, value = self.cfg, norm.float()
        warming = self.count < cfg.warmup
        deviation = self.variance.sqrt()
        z = (value - self.mean) / (deviation + EPS)
        # What is no spike lies below this, so that it is not clipped.
        limit = self.mean + cfg.z_threshold * (deviation + EPS)
        if cfg.target is ZScoreTarget.reciprocal:
            target = self.mean + cfg.z_threshold**2 / z * deviation
        elif cfg.target is ZScoreTarget.threshold:
            target = self.mean + cfg.z_threshold * deviation
        else:
            target = self.mean.clone()
        limit = torch.where(z > cfg.z_threshold, target, limit)
        limit = torch.where(warming, torch.full_like(limit, cfg.initial), limit)
        if cfg.max_norm is not None:
            limit = limit.clamp(max=cfg.max_norm)
        self._remember(value, torch.minimum(value, limit), warming)
        return limit.to(norm.dtype)

    def _remember(self, norm: Tensor, clipped: Tensor, warming: Tensor) -> None:
        finite = torch.isfinite(norm)
        # While warming: mean and variance (over n) of all norms so far, brought forward by one (Welford 1962).
        seen = (self.count + 1).float()
        first_mean = self.mean + (norm - self.mean) / seen
        first_variance = self.variance + ((norm - self.mean) * (norm - first_mean) - self.variance) / seen
        alpha = self.cfg.alpha
        mean = alpha * self.mean + (1 - alpha) * clipped
        variance = alpha * self.variance + (1 - alpha) * (clipped - mean) ** 2
        mean, variance = torch.where(warming, first_mean, mean), torch.where(warming, first_variance, variance)
        self.mean.copy_(torch.where(finite, mean, self.mean))
        self.variance.copy_(torch.where(finite, variance, self.variance))
        self.count += finite
