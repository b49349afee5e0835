"""Gradient clipping: a fixed norm, or a threshold that follows the norms seen so far.

Rules are modules, so that what they remember is saved with the checkpoint. Nothing here waits for the device: norms
and thresholds stay tensors.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.training.clipping.config import ClipConfig, NoClip, NormClip, PercentileClip


class ClipResult(NamedTuple):
    """The gradient's L2 norm before clipping and the threshold it was held to, as 0-d tensors."""

    norm: Tensor
    threshold: Tensor


class ClipRule(nn.Module):
    """Base: computes the norm of the whole gradient and scales the gradients down to :meth:`threshold`."""

    def threshold(self, norm: Tensor) -> Tensor:
        """The largest norm allowed now, given the ``norm`` at hand, which it may remember."""
        return torch.full_like(norm, torch.inf)

    def clip(self, parameters: Iterable[nn.Parameter]) -> ClipResult:
        """Clip the gradients of ``parameters`` in place."""
        with_grad = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_grad if p.grad is not None])
        threshold = self.threshold(norm)
        torch.nn.utils.clip_grads_with_norm_(with_grad, threshold, norm)  # type: ignore[arg-type]
        return ClipResult(norm, threshold)


class NoRule(ClipRule):
    """Measures the norm and clips nothing."""

    def __init__(self, cfg: NoClip) -> None:
        super().__init__()

    def clip(self, parameters: Iterable[nn.Parameter]) -> ClipResult:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return ClipResult(norm, torch.full_like(norm, torch.inf))


class NormRule(ClipRule):
    """A fixed largest norm (Pascanu et al. 2013)."""

    def __init__(self, cfg: NormClip) -> None:
        super().__init__()
        self.max_norm = cfg.max_norm

    def threshold(self, norm: Tensor) -> Tensor:
        return torch.full_like(norm, self.max_norm)


class PercentileRule(ClipRule):
    """AutoClip (Seetharaman et al. 2020, arXiv 2007.14469): the threshold is a percentile of the past norms.

    The norm at hand joins the history before the percentile is taken, as in the paper, unless it is not finite.
    """

    history: Tensor
    count: Tensor

    def __init__(self, cfg: PercentileClip) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_buffer("history", torch.full((cfg.window,), torch.nan))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def threshold(self, norm: Tensor) -> Tensor:
        finite = torch.isfinite(norm)
        slot = (self.count % self.cfg.window).reshape(1)
        self.history.index_copy_(0, slot, torch.where(finite, norm.float(), self.history[slot].squeeze()).reshape(1))
        self.count += finite
        known = torch.nanquantile(self.history, self.cfg.percentile / 100)
        return torch.where(self.count >= self.cfg.min_history, known, torch.full_like(known, self.cfg.initial))


# Add a clip rule: a dataclass in training.config.CLIP_CONFIGS, and its module here.
CLIP_RULES: dict[type[ClipConfig], Callable[..., ClipRule]] = {
    NoClip: NoRule,
    NormClip: NormRule,
    PercentileClip: PercentileRule,
}


def build_clip(cfg: ClipConfig) -> ClipRule:
    """The clip rule of a configuration, whose values :func:`check_run` has checked."""
    if type(cfg) not in CLIP_RULES:
        raise ConfigError(f"clip={cfg.name} has no entry in bitnet_train.training.clipping.rules.CLIP_RULES")
    return CLIP_RULES[type(cfg)](cfg)
